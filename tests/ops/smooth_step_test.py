import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.ops.smooth_step import smooth_step
from tests import token_loop
from tests.test_case import TestCase


class SmoothStepTest(TestCase):
    @parameterized.parameters(1.0, 0.3)
    def test_against_formula(self, gamma):
        x = gamma * np.array(
            [-9, -0.51, -0.4, -0.1, 0, 0.2, 0.45, 0.51, 3], "float32"
        )

        def formula(x):
            cubic = 0.5 + 1.5 * x / gamma - 2 * x**3 / gamma**3
            cubic = np.where(x <= -gamma / 2, 0, cubic)
            return np.where(x >= gamma / 2, 1, cubic)

        layer = keras.layers.Lambda(lambda x: smooth_step(x, gamma))
        layer.build(x.shape)
        s, d_x, _ = self.outputs_and_gradients(layer, x)
        self.assert_relative(s, formula(x.astype("float64")), 1e-6)
        expected = token_loop.gradients(
            lambda arrays: np.sum(formula(arrays["x"])), {"x": x}
        )["x"]
        self.assert_relative(d_x, expected)

    def test_exact_at_the_ends_and_never_outside(self):
        for gamma in (1.0, 0.3, 7.0):
            end = np.float32(gamma) / 2
            x = np.array([-end, end], "float32")
            self.assertAllEqual(
                smooth_step(ops.convert_to_tensor(x), gamma), [0.0, 1.0]
            )
            # One step of float32 after the other.
            for _ in range(50):
                x = np.nextafter(x, np.float32(0))
                s = ops.convert_to_numpy(
                    smooth_step(ops.convert_to_tensor(x), gamma)
                )
                self.assertTrue(np.all((s >= 0) & (s <= 1)), s)
