import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import PatchEmbedding
from keras_moe.vision.layers.positions import resized_grid
from tests.test_case import TestCase


def embedded(images, kernel, bias, size):
    """Patch by patch."""
    rows = []
    for image in images:
        tokens = []
        for top in range(0, image.shape[0], size[0]):
            for left in range(0, image.shape[1], size[1]):
                patch = image[top : top + size[0], left : left + size[1]]
                tokens.append(patch.reshape(-1) @ kernel + bias)
        rows.append(tokens)
    return np.array(rows)


def randomized(layer, shape):
    layer.build(shape)
    rng = np.random.default_rng(0)
    for variable in layer.weights:
        variable.assign(rng.normal(size=variable.shape))
    return [ops.convert_to_numpy(variable) for variable in layer.weights]


class PatchEmbeddingTest(TestCase):
    def setUp(self):
        super().setUp()
        self.images = np.random.default_rng(1).normal(size=(2, 4, 6, 3))

    @parameterized.parameters("channels_last", "channels_first")
    def test_class_token_and_positions(self, data_format):
        images = self.images
        if data_format == "channels_first":
            images = images.transpose(0, 3, 1, 2)
        layer = PatchEmbedding(
            8, (2, 3), use_class_token=True, data_format=data_format
        )
        randomized(layer, images.shape)
        by_name = {v.name: ops.convert_to_numpy(v) for v in layer.weights}
        token, positions = by_name["class_token"], by_name["positions"]
        kernel, bias = by_name["kernel"], by_name["bias"]
        patches = embedded(self.images, kernel, bias, (2, 3))
        wanted = np.concatenate([np.repeat(token, 2, 0), patches], 1)
        self.assert_relative(layer(images), wanted + positions)
        self.assertEqual(layer.grid, (2, 2))
        self.assertEqual(
            layer.compute_output_shape((None, *images.shape[1:])), (None, 5, 8)
        )

    def test_layer_norm(self):
        """Of the patches alone: neither of positions nor of a class token."""
        layer = PatchEmbedding(
            8, (2, 3), use_class_token=True, layer_norm_epsilon=1e-3
        )
        randomized(layer, self.images.shape)
        by_path = {
            v.path.split("/", 1)[1]: ops.convert_to_numpy(v)
            for v in layer.weights
        }
        patches = embedded(
            self.images,
            by_path["projection/kernel"],
            by_path["projection/bias"],
            (2, 3),
        )
        mean = patches.mean(-1, keepdims=True)
        width = np.sqrt(patches.var(-1, keepdims=True) + 1e-3)
        patches = (patches - mean) / width
        patches = patches * by_path["norm/gamma"] + by_path["norm/beta"]
        token = np.repeat(by_path["class_token"], 2, 0)
        wanted = np.concatenate([token, patches], 1) + by_path["positions"]
        self.assert_relative(layer(self.images), wanted)
        again = PatchEmbedding.from_config(layer.get_config())
        self.assertEqual(again.layer_norm_epsilon, 1e-3)
        with self.assertRaisesRegex(ValueError, "`layer_norm_epsilon` must"):
            PatchEmbedding(8, 2, layer_norm_epsilon=0)

    def test_sincos(self):
        layer = PatchEmbedding(
            8, 2, positions="sincos", data_format="channels_last"
        )
        kernel, bias = randomized(layer, self.images.shape)
        added = ops.convert_to_numpy(layer(self.images)) - embedded(
            self.images, kernel, bias, (2, 2)
        )
        for place in range(6):
            y, x = divmod(place, 3)
            wanted = []
            for at in (x, y):
                angles = [at, at / 10000]
                wanted += [*np.sin(angles), *np.cos(angles)]
            self.assertAllClose(added[1, place], wanted, atol=1e-5)

    def test_without_positions_and_bias(self):
        layer = PatchEmbedding(
            5, 2, positions=None, use_bias=False, data_format="channels_last"
        )
        (kernel,) = randomized(layer, self.images.shape)
        self.assert_relative(
            layer(self.images), embedded(self.images, kernel, 0, (2, 2))
        )

    def test_half_precision_and_config(self):
        layer = PatchEmbedding(
            8, 2, use_class_token=True, dtype="mixed_bfloat16"
        )
        config = layer.get_config()
        again = PatchEmbedding.from_config(config)
        self.assertEqual(again.get_config(), config)
        outputs = again(ops.convert_to_tensor(self.images[:, :4, :4, :]))
        self.assertEqual(
            keras.backend.standardize_dtype(outputs.dtype), "bfloat16"
        )
        self.assertEqual(again.positions.dtype, "float32")

    def test_grid_of_other_shape(self):
        """Each axis by itself; the corners stay."""
        grid = np.random.default_rng(2).normal(size=(2, 3, 4))
        larger = resized_grid(grid, 3, 5)
        self.assertAllClose(larger[::2, ::2], grid)
        self.assertAllClose(larger[1, ::2], grid.mean(0))
        self.assertAllClose(larger[::2, 1::2], (grid[:, :-1] + grid[:, 1:]) / 2)
        self.assertAllClose(resized_grid(grid[:1, :1], 2, 2)[1, 1], grid[0, 0])

    def test_errors(self):
        for arguments, words in (
            ({"hidden_dim": 0, "patch_size": 2}, "`hidden_dim` must be an int"),
            ({"hidden_dim": 4, "patch_size": 0}, "Received: patch_size=0"),
            ({"hidden_dim": 4, "patch_size": [2, 2, 2]}, "positive int or two"),
            (
                {"hidden_dim": 6, "patch_size": 2, "positions": "sincos"},
                "multiple of 4 .* Received: hidden_dim=6",
            ),
            (
                {"hidden_dim": 4, "patch_size": 2, "positions": "rope"},
                "`positions` must be one of",
            ),
            (
                {"hidden_dim": 4, "patch_size": 2, "data_format": "NHWC"},
                "`data_format` must be one of",
            ),
        ):
            with self.assertRaisesRegex(ValueError, words):
                PatchEmbedding(**arguments)
        layer = PatchEmbedding(4, 4, data_format="channels_last")
        with self.assertRaisesRegex(ValueError, r"must divide .* \(4, 6\)"):
            layer(self.images)
        with self.assertRaisesRegex(ValueError, "static but for the batch"):
            layer.build((None, None, 8, 3))
        built = PatchEmbedding(4, 2)
        built.build((None, 4, 4, 4))
        for other, words in (
            (PatchEmbedding(4, 2), "built=False"),
            (PatchEmbedding(8, 2), "`hidden_dim` of both"),
            (PatchEmbedding(4, 2, positions=None), "positions=None"),
        ):
            if "built" not in words:
                other.build((None, 4, 4, 4))
            with self.assertRaisesRegex(ValueError, words):
                built.assign_positions_of(other)
