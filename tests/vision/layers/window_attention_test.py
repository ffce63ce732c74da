import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import EncoderBlock
from keras_moe.layers import WindowAttention
from tests import token_loop
from tests.test_case import TestCase

DIM = 4


def filled(layer, tokens, seed=0):
    """A built layer whose weights all matter."""
    layer.build((None, tokens, DIM))
    rng = np.random.default_rng(seed)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * 0.7)
    return layer


def by_pairs(layer, x, size, shift, measured):
    """One query after the other, by the places of its keys."""
    rows, columns = layer.grid
    w = {v.path: ops.convert_to_numpy(v) for v in layer.trainable_variables}
    w = {path.split("/", 1)[1]: value for path, value in w.items()}
    places = [(r, c) for r in range(rows) for c in range(columns)]
    head = DIM // layer.num_heads
    out = np.zeros_like(x)
    for b, image in enumerate(x):
        qkv = image @ w["qkv/kernel"] + w.get("qkv/bias", 0.0)
        for i, (r, c) in enumerate(places):
            seen = [
                j
                for j, (s, d) in enumerate(places)
                if (s - shift) // size == (r - shift) // size
                and (d - shift) // size == (c - shift) // size
            ]
            y = np.zeros(DIM)
            for h in range(layer.num_heads):
                of_head = slice(h * head, (h + 1) * head)
                q, k, v = (
                    qkv[:, part * DIM : (part + 1) * DIM][:, of_head]
                    for part in range(3)
                )
                logits = []
                for j in seen:
                    offset = np.array([r, c]) - places[j]
                    offset = 8 * offset / (measured - 1)
                    offset = np.sign(offset) * np.log2(abs(offset) + 1) / 3
                    hidden = offset @ w["bias_1/kernel"] + w["bias_1/bias"]
                    bias = np.maximum(hidden, 0) @ w["bias_2/kernel"]
                    logits.append(q[i] @ k[j] / np.sqrt(head) + bias[h])
                y[of_head] = token_loop.softmax(np.array(logits)) @ v[seen]
            out[b, i] = y @ w["output/kernel"] + w["output/bias"]
    return out


class WindowAttentionTest(TestCase):
    @parameterized.named_parameters(
        ("whole", (4, 6), 2, 0, None, True),
        ("shifted", (4, 6), 2, 1, None, False),
        ("filled_up", (5, 4), 3, 0, 5, True),
        ("shifted_and_filled_up", (7, 5), 4, 2, None, True),
        ("one_window", (3, 3), 4, 2, None, True),
        ("flat", (2, 6), 2, 1, None, True),
    )
    def test_by_pairs(self, grid, size, shift, measured, use_bias):
        rows, columns = grid
        layer = WindowAttention(
            2, grid, size, shift, measured, use_bias, bias_hidden_dim=3
        )
        filled(layer, rows * columns)
        x = np.random.default_rng(1).normal(size=(2, rows * columns, DIM))
        x = x.astype("float32")
        if min(grid) <= size:  # as in the original
            size, shift = min(grid), 0
        wanted = by_pairs(layer, x, size, shift, measured or size)
        self.assert_relative(layer(x), wanted)

    def test_others_do_not_count(self):
        """The gradient of a token reaches its window, and no other one."""
        layer = filled(WindowAttention(2, (5, 6), 4, 2), 30)
        x = np.random.default_rng(1).normal(size=(1, 30, DIM))
        cotangent = np.zeros((1, 30, DIM), "float32")
        cotangent[0, 4 * 6 + 1] = 1.0  # row 4, column 1
        _, gradient, _ = self.outputs_and_gradients(
            layer, x.astype("float32"), cotangent
        )
        reached = np.abs(gradient[0]).max(1).reshape(5, 6) > 0
        wanted = np.zeros((5, 6), bool)
        wanted[2:, :2] = True
        self.assertAllEqual(reached, wanted)

    def test_half_precision_and_dropout(self):
        single = filled(WindowAttention(2, (4, 4), 2, 1), 16)
        half = WindowAttention(2, (4, 4), 2, 1, dtype="mixed_bfloat16")
        filled(half, 16)
        x = np.random.default_rng(1).normal(size=(2, 16, DIM))
        y = half(x.astype("float32"))
        self.assertEqual(keras.backend.standardize_dtype(y.dtype), "bfloat16")
        difference = ops.convert_to_numpy(ops.cast(y, "float32") - single(x))
        self.assertLess(np.abs(difference).mean(), 0.1)
        layer = filled(WindowAttention(2, (4, 4), 2, dropout=0.5), 16)
        plain = filled(WindowAttention(2, (4, 4), 2), 16)
        wanted = ops.convert_to_numpy(plain(x))
        self.assert_relative(layer(x, training=False), wanted)
        dropped = ops.convert_to_numpy(layer(x, training=True))
        self.assertGreater(np.abs(dropped - wanted).max(), 1e-2)

    def test_saved_in_a_block(self):
        block = EncoderBlock(
            None,
            keras.layers.Dense(DIM),
            token_mixer=WindowAttention(2, (4, 3), 2, 1, name="attention"),
        )
        inputs = keras.Input((12, DIM))
        model = keras.Model(inputs, block(inputs))
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        x = np.random.default_rng(1).normal(size=(2, 12, DIM))
        self.assert_relative(loaded(x), ops.convert_to_numpy(model(x)))
        self.assertEqual(
            [v.path for v in loaded.weights], [v.path for v in model.weights]
        )

    @parameterized.parameters(
        ({"num_heads": 0}, "`num_heads` must be an int"),
        ({"num_heads": 3}, "`num_heads` must divide the width"),
        ({"grid": (3, 5)}, "`grid` must have as many places"),
        ({"grid": 0}, "`grid` must be an int"),
        ({"window_size": 0}, "`window_size` must be an int"),
        ({"shift": 2}, "`shift` must be below `window_size`"),
        ({"shift": -1}, "`shift` must be an int"),
        ({"pretrained_window_size": 0}, "`pretrained_window_size` must be"),
        ({"use_bias": 2}, "`use_bias` must be True or False"),
        ({"dropout": 1}, "`dropout` must be a number"),
        ({"bias_hidden_dim": 0}, "`bias_hidden_dim` must be an int"),
    )
    def test_errors(self, arguments, words):
        arguments = {
            "num_heads": 2,
            "grid": (4, 4),
            "window_size": 2,
            **arguments,
        }
        with self.assertRaisesRegex(ValueError, words):
            WindowAttention(**arguments)(np.zeros((1, 16, DIM)))

    def test_errors_of_a_block(self):
        mixer = WindowAttention(2, (4, 4), 2)
        for arguments, words in (
            ({"num_heads": 2, "token_mixer": mixer}, "in the place of att"),
            ({"num_heads": None, "token_mixer": 3}, "must be a layer"),
            ({"num_heads": None}, "`num_heads` must be an int"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                EncoderBlock(feed_forward=keras.layers.Dense(DIM), **arguments)
