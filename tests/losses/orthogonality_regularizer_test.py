import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.losses import OrthogonalityRegularizer
from keras_moe.routers import TopKRouter
from tests import token_loop
from tests.losses.gradients import differentiated
from tests.losses.gradients import value_and_gradient
from tests.test_case import TestCase


def loop(vectors):
    """Mean squared cosine of all ordered pairs of different rows."""
    values = [
        (a @ b) ** 2 / (a @ a) / (b @ b)
        for i, a in enumerate(vectors)
        for j, b in enumerate(vectors)
        if i != j
    ]
    return float(np.mean(values)) if values else 0.0


class OrthogonalityRegularizerTest(TestCase):
    @parameterized.parameters(
        ((5, 3), -1), ((3, 5), 0), ((3, 2, 4), 0), ((2, 3, 4), 1)
    )
    def test_against_loop(self, shape, axis):
        kernel = np.random.default_rng(0).normal(size=shape)

        def expected(parts):
            vectors = np.moveaxis(parts["kernel"], axis, 0)
            return 0.5 * loop(vectors.reshape(shape[axis], -1))

        regularizer = OrthogonalityRegularizer(0.5, axis)
        value, gradient = value_and_gradient(regularizer, kernel)
        parts = {"kernel": kernel}
        self.assertAllClose(value, expected(parts), rtol=1e-5)
        wanted = token_loop.gradients(expected, parts)["kernel"]
        self.assertAllClose(gradient, wanted, rtol=1e-4, atol=1e-5)

    def test_bounds(self):
        regularizer = OrthogonalityRegularizer(2.0)
        self.assertEqual(float(regularizer(ops.eye(4)[:, :3])), 0.0)
        parallel = np.outer([1.0, 2.0, 3.0], [1.0, -2.0, 5.0])
        self.assertAllClose(regularizer(ops.array(parallel, "float32")), 2.0)
        # Three directions of a plane, 120 degrees apart: the least there is.
        angles = 2 * np.pi * np.arange(3) / 3
        frame = np.stack([np.cos(angles), np.sin(angles)])
        least = 2.0 * (3 - 2) / (2 * (3 - 1))
        self.assertAllClose(regularizer(ops.array(frame, "float32")), least)

    def test_the_least_is_reached_by_training(self):
        kernel = np.random.default_rng(1).normal(size=(4, 4))
        regularizer = OrthogonalityRegularizer(1.0)
        before = float(regularizer(ops.array(kernel, "float32")))
        run = differentiated(regularizer)
        for _ in range(40):
            value, gradient = run(kernel)
            kernel = kernel - gradient
        self.assertGreater(before, 0.02)
        self.assertLess(value, 0.2 * before)

    def test_degenerate_kernels(self):
        regularizer = OrthogonalityRegularizer(1.0)
        single = np.ones((3, 1))
        self.assertEqual(value_and_gradient(regularizer, single)[0], 0.0)
        run = differentiated(regularizer)
        for scale, expected in ((0.0, 0.0), (1e-25, 1.0), (1e25, 1.0)):
            value, gradient = run(np.full((3, 2), scale))
            self.assertAllClose(value, expected)
            self.assertTrue(np.isfinite(gradient).all())
        half = regularizer(ops.full((300, 2), 100.0, "float16"))
        self.assertEqual(keras.backend.standardize_dtype(half.dtype), "float32")
        self.assertAllClose(half, 1.0)

    def test_of_a_router(self):
        router = TopKRouter(3, kernel_regularizer=OrthogonalityRegularizer(0.1))
        router.build((None, 5))
        kernel = ops.convert_to_numpy(router.kernel)
        (loss,) = router.losses
        self.assertAllClose(loss, 0.1 * loop(kernel.T), rtol=1e-4)
        again = TopKRouter.from_config(router.get_config())
        self.assertEqual(again.kernel_regularizer.weight, 0.1)

    def test_config_and_errors(self):
        regularizer = OrthogonalityRegularizer(0.3, 0)
        config = keras.regularizers.serialize(regularizer)
        again = keras.regularizers.get(config)
        self.assertEqual(vars(again), vars(regularizer))
        with self.assertRaisesRegex(ValueError, "weight=-1"):
            OrthogonalityRegularizer(-1)
        with self.assertRaisesRegex(ValueError, r"expert_axis=2.*\(2, 3\)"):
            OrthogonalityRegularizer(expert_axis=2)(ops.ones((2, 3)))
