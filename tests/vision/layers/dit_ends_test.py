import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.vision.layers.dit_ends import DiffusionEmbedding
from keras_moe.vision.layers.dit_ends import DiTHead
from tests.test_case import TestCase
from tests.vision.models.tiny import randomize


class DiffusionEmbeddingTest(TestCase):
    def test_definition(self):
        layer = DiffusionEmbedding(4, num_classes=3)
        times, labels = np.array([0.0, 7.5, 999.0]), np.array([2, 0, 3])
        layer(times, labels)
        randomize(layer)
        kernel_1, bias_1, kernel_2, bias_2, table = (
            ops.convert_to_numpy(v) for v in layer.trainable_variables
        )
        wanted = []
        for t, label in zip(times, labels, strict=True):
            angles = [t * 10000 ** (-i / 128) for i in range(128)]
            waves = np.concatenate([np.cos(angles), np.sin(angles)])
            hidden = waves @ kernel_1 + bias_1
            hidden = hidden / (1 + np.exp(-hidden))
            wanted.append(hidden @ kernel_2 + bias_2 + table[label])
        self.assert_relative(layer(times, labels), np.array(wanted), 2e-5)

    def test_times_keep_their_precision(self):
        """bfloat16 has 8 bits: it would make one time of 998 and 999."""
        layer = DiffusionEmbedding(4, num_classes=3, dtype="mixed_bfloat16")
        times, labels = np.array([998.0, 999.0]), np.array([0, 0])
        layer(times, labels)
        x = randomize(layer)(times, labels)
        x = ops.convert_to_numpy(ops.cast(x, "float32"))
        self.assertGreater(np.abs(x[0] - x[1]).max(), 0.1)

    def test_labels_are_dropped(self):
        layer = DiffusionEmbedding(2, num_classes=3, label_dropout=0.4, seed=0)
        times, labels = np.zeros(400), np.arange(400) % 3
        every = ops.convert_to_numpy(layer(np.zeros(4), np.arange(4)))
        outputs = ops.convert_to_numpy(layer(times, labels, training=True))
        dropped = np.abs(outputs - every[3]).max(1) < 1e-6
        self.assertBetween(dropped.sum(), 120, 200)
        self.assert_relative(outputs[~dropped], every[labels[~dropped]])
        outputs = ops.convert_to_numpy(layer(times, labels))
        self.assert_relative(outputs, every[labels])
        # Without any there is no state.
        layer = DiffusionEmbedding(2, num_classes=3, label_dropout=0.0)
        layer(times, labels, training=True)
        self.assertEmpty(layer.non_trainable_variables)

    @parameterized.parameters(-1, 4)
    def test_labels_out_of_range(self, label):
        layer = DiffusionEmbedding(2, num_classes=3)
        with self.assertRaisesRegex(ValueError, f"no class. Received: {label}"):
            layer(np.zeros(2), np.array([0, label]))

    def test_errors(self):
        for arguments, words in (
            ({"num_classes": 0}, "`num_classes` must be an int"),
            ({"label_dropout": 1.0}, "`label_dropout` must be a number"),
            ({"seed": "x"}, "`seed` must be an int"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                DiffusionEmbedding(
                    **{"hidden_dim": 2, "num_classes": 3, **arguments}
                )


class DiTHeadTest(TestCase):
    @parameterized.parameters("channels_last", "channels_first")
    def test_patches_become_images(self, data_format):
        layer = DiTHead((2, 3), (4, 1), 5, data_format)
        tokens = np.random.default_rng(0).normal(size=(2, 6, 4))
        condition = np.zeros((2, 3))
        layer(tokens, condition)
        randomize(layer)
        patches = ops.convert_to_numpy(
            layer.dense(
                layer.norm(tokens)
                * (1 + layer.modulation(condition)[:, None, 4:])
                + layer.modulation(condition)[:, None, :4]
            )
        )
        images = ops.convert_to_numpy(layer(tokens, condition))
        shape = layer.compute_output_shape((2, 6, 4), (2, 3))
        self.assertEqual(images.shape, shape)
        if data_format == "channels_first":
            images = images.transpose(0, 2, 3, 1)
        self.assertEqual(images.shape, (2, 8, 3, 5))
        for patch in range(6):
            row, column = divmod(patch, 3)
            wanted = patches[:, patch].reshape(2, 4, 1, 5)
            part = images[:, 4 * row : 4 * row + 4, column : column + 1]
            self.assert_relative(part, wanted)
