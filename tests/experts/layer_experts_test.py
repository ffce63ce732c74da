import keras
import numpy as np
from absl.testing import parameterized
from keras import layers
from keras import ops

import keras_moe
from keras_moe.experts import LayerExperts
from tests.experts.bank_case import BankTestCase
from tests.experts.bank_case import compiled

SIZES = (3, 0, 2)


def dense(row, w, e):
    kernel, bias = w[f"expert_{e}/kernel"], w[f"expert_{e}/bias"]
    return np.tanh(row @ kernel + bias)


def conv(row, w, e):
    """3 x 3 without padding, every other position, on one image."""
    kernel, bias = w[f"expert_{e}/kernel"], w[f"expert_{e}/bias"]
    size = (len(row) - 3) // 2 + 1
    out = np.zeros((size, size, kernel.shape[-1]))
    for i, j in np.ndindex(size, size):
        patch = row[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        out[i, j] = np.einsum("hwc,hwcd->d", patch, kernel) + bias
    return out


def attention():
    x = keras.Input((3, 4))
    y = layers.MultiHeadAttention(2, 3)(x, x)
    return keras.Model(x, layers.LayerNormalization()(x + y))


class LayerExpertsTest(BankTestCase):
    def setUp(self):
        super().setUp()
        self.rng = np.random.default_rng(8)
        self.rows = self.rng.normal(size=(6, 4)).astype("float32")

    @parameterized.parameters((None,), (3,))
    def test_dense(self, max_group_size):
        layer = LayerExperts(layers.Dense(5, activation="tanh"), 3)
        self.check_bank(
            layer, self.rows, SIZES, dense, max_group_size=max_group_size
        )

    def test_images(self):
        layer = LayerExperts(layers.Conv2D(2, 3, strides=2), 3)
        rows = self.rng.normal(size=(6, 5, 5, 2))
        self.check_bank(layer, rows, SIZES, conv)
        self.assertEqual(
            layer.compute_output_shape((None, 5, 5, 2)), (None, 2, 2, 2)
        )

    @parameterized.named_parameters(
        ("lstm", lambda: layers.LSTM(5)),
        ("conv1d", lambda: layers.Conv1D(2, 2, padding="causal")),
        ("attention", attention),
        (
            "sequential",
            lambda: keras.Sequential([layers.GRU(3), layers.Dense(2)]),
        ),
    )
    def test_sequences(self, make):
        layer = LayerExperts(make(), 3)
        rows = self.rng.normal(size=(6, 3, 4)).astype("float32")
        out = ops.convert_to_numpy(layer(rows, ops.array(SIZES, "int32")))
        again = compiled(layer, rows, SIZES)
        for i, e in enumerate(np.repeat(np.arange(3), SIZES)):
            wanted = ops.convert_to_numpy(layer.layers[e](rows[i : i + 1]))[0]
            self.assert_relative(out[i], wanted)
            self.assert_relative(again[i], wanted)
        self.assertAllEqual(out[5:], 0 * out[5:])

    def test_a_list_of_different_layers(self):
        given = [
            layers.Dense(4, name="a"),
            keras.Sequential([layers.Dense(2), layers.Dense(4)], name="b"),
            layers.Identity(),
        ]
        given[0].build((None, 4))
        kernel = ops.convert_to_numpy(given[0].kernel)
        layer = LayerExperts(given)
        out = ops.convert_to_numpy(layer(self.rows, ops.array((2, 2, 2))))
        self.assertAllClose(out[:2], self.rows[:2] @ kernel, rtol=1e-5)
        b = [ops.convert_to_numpy(v) for v in given[1].weights]
        wanted = (self.rows[2:4] @ b[0] + b[1]) @ b[2] + b[3]
        self.assertAllClose(out[2:4], wanted, rtol=1e-4, atol=1e-6)
        self.assertAllEqual(out[4:], self.rows[4:])
        self.assertLen(layer.trainable_variables, 6)

    def test_copies_are_of_their_own(self):
        template = keras.Sequential(
            [
                layers.Dense(
                    4, kernel_initializer=keras.initializers.HeNormal(seed=3)
                ),
                layers.Dropout(0.5, seed=4),
            ]
        )
        template.build((None, 4))

        def kernels():
            layer = LayerExperts(template, 3, name="experts")
            layer.build((None, 4))
            self.assertEqual(
                {v.path.split("/")[1] for v in layer.weights},
                {"expert_0", "expert_1", "expert_2"},
            )
            seeds = [c.layers[-1].seed for c in layer.layers]
            return seeds, [
                ops.convert_to_numpy(v)
                for v in (*layer.weights, template.layers[0].kernel)
                if v.name == "kernel"
            ]

        seeds, matrices = kernels()
        self.assertLen({*seeds, 4}, 4)
        self.assertLen(matrices, 4)
        for i in range(4):
            for j in range(i):
                self.assertGreater(np.abs(matrices[i] - matrices[j]).max(), 0.1)
        again, others = kernels()
        self.assertEqual(seeds, again)
        self.assertAllEqual(np.stack(matrices), np.stack(others))

    def test_training_is_passed_on(self):
        layer = LayerExperts(layers.Dropout(0.5), 2)
        sizes = ops.array((3, 3), "int32")
        self.assertAllEqual(layer(self.rows, sizes), self.rows)
        out = ops.convert_to_numpy(layer(self.rows, sizes, training=True))
        for part, rows in ((out[:3], self.rows[:3]), (out[3:], self.rows[3:])):
            self.assertTrue((part != rows).any())
        self.assertAllEqual(layer(self.rows, sizes, training=False), self.rows)

    def test_no_rows(self):
        self.check_no_rows(LayerExperts(layers.Dense(3), 2), (4,), (3,))
        template = keras.Sequential(
            [layers.Dense(3), layers.BatchNormalization()]
        )
        self.check_no_rows(LayerExperts(template, 2), (4,), (3,))
        self.check_no_rows(LayerExperts(layers.Conv1D(2, 2), 2), (3, 4), (2, 2))

    def test_dtypes(self):
        def make(dtype):
            return LayerExperts(layers.Dense(3, dtype=dtype), 3, dtype=dtype)

        self.check_dtypes(make, self.rows, SIZES)
        layer = LayerExperts(layers.Dense(3), 3, dtype="bfloat16")
        out = layer(ops.cast(self.rows, "bfloat16"), ops.array(SIZES))
        self.assertEqual(keras.backend.standardize_dtype(out.dtype), "bfloat16")

    def test_saving(self):
        initializer = keras.initializers.HeNormal(seed=3)
        for layer in (
            LayerExperts(layers.Dense(3, kernel_initializer=initializer), 3),
            LayerExperts(
                keras.Sequential(
                    [layers.Dense(4), layers.BatchNormalization()]
                ),
                num_experts=3,
            ),
            LayerExperts([layers.Dense(4), layers.Identity(), layers.ReLU()]),
        ):
            self.check_saving(layer, self.rows, (3, 0, 3))

    @parameterized.parameters("sgd", "adam")
    def test_fit_with_an_expert_without_rows(self, optimizer):
        moe = keras_moe.layers.MoE(
            router=keras_moe.routers.TopKRouter(3, top_k=1, use_bias=True),
            experts=LayerExperts(layers.Dense(4, activation="relu"), 3),
            losses=None,
        )
        model = keras.Sequential([keras.Input((4,)), moe])
        # Expert 1 is out of reach.
        moe.router.bias.assign([0.0, -1e6, 0.0])
        before = [ops.convert_to_numpy(v) for v in moe.experts.weights]
        model.compile(optimizer, "mse")
        x = self.rng.normal(size=(16, 4)).astype("float32")
        history = model.fit(x, x, batch_size=8, epochs=2, verbose=0)
        self.assertTrue(np.isfinite(history.history["loss"]).all())
        for v, value in zip(moe.experts.weights, before, strict=True):
            change = np.abs(ops.convert_to_numpy(v) - value).max()
            if "expert_1" in v.path:
                self.assertEqual(change, 0)
            elif v.name == "kernel":
                self.assertGreater(change, 0)

    def test_errors(self):
        dense = layers.Dense(3)
        for layer in ("dense", [dense, "dense"], None):
            with self.assertRaisesRegex(
                ValueError, "must be a layer or a list"
            ):
                LayerExperts(layer, 2)
        for layer in ([], [dense, dense]):
            with self.assertRaisesRegex(ValueError, "at least one layer"):
                LayerExperts(layer)
        with self.assertRaisesRegex(ValueError, "num_experts=3, a list of 1"):
            LayerExperts([dense], 3)
        for number in (None, 0):
            with self.assertRaisesRegex(ValueError, f"num_experts={number}"):
                LayerExperts(dense, number)
        with self.assertRaisesRegex(ValueError, "rows of the same shape"):
            LayerExperts([dense, layers.Dense(4)]).build((None, 4))
        with self.assertRaisesRegex(ValueError, "one tensor.*'expert_0'"):
            LayerExperts(layers.LSTM(3, return_state=True), 2).build(
                (None, 2, 4)
            )
        x = keras.Input((4,))
        total = keras.Model(x, ops.sum(x, axis=0), name="total")
        with self.assertRaisesRegex(ValueError, "a row for each .*'total'"):
            LayerExperts([total]).build((None, 4))
