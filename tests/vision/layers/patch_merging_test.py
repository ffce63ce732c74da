import numpy as np
from absl.testing import parameterized

from keras_moe.layers import PatchMerging
from tests.test_case import TestCase

DIM = 4


class PatchMergingTest(TestCase):
    def test_by_places(self):
        layer = PatchMerging((4, 2))
        layer.build((None, 8, DIM))
        rng = np.random.default_rng(0)
        for variable in layer.trainable_variables:
            variable.assign(rng.normal(size=variable.shape))
        x = np.random.default_rng(1).normal(size=(2, 8, DIM)).astype("float32")
        gamma, beta, kernel = layer.get_weights()
        image = x.reshape(2, 4, 2, DIM)
        for row in range(2):
            four = np.concatenate(
                [
                    image[:, 2 * row + down, right]
                    for right in (0, 1)
                    for down in (0, 1)
                ],
                -1,
            )
            mean, variance = four.mean(-1), four.var(-1)
            four = (four - mean[:, None]) / np.sqrt(variance[:, None] + 1e-5)
            self.assert_relative(
                layer(x)[:, row], (four * gamma + beta) @ kernel
            )
        self.assertEqual(layer(x).shape, layer.compute_output_shape(x.shape))
        again = PatchMerging.from_config(layer.get_config())
        self.assertEqual(again.grid, (4, 2))

    @parameterized.parameters(
        ({"grid": (3, 4)}, "two even ints"),
        ({"grid": (4, 4)}, "`grid` must have as many places"),
        ({"layer_norm_epsilon": 0}, "`layer_norm_epsilon` must be"),
    )
    def test_errors(self, arguments, words):
        with self.assertRaisesRegex(ValueError, words):
            PatchMerging(**{"grid": (4, 2), **arguments})(np.zeros((1, 8, 4)))
