import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import experts
from tests.experts.bank_case import BankTestCase
from tests.token_loop import softmax

SIZES = (2, 0, 1, 2, 1, 2)  # of 2 + 1 + 1 + 1 + 1 experts


def make(**kwargs):
    return experts.MixedExperts(
        [
            experts.MLPExperts(2, 5, activation="tanh", name="mlp"),
            experts.ZeroExperts(1),
            experts.ConstantExperts(1, name="constant"),
            experts.CopyExperts(1),
            experts.LayerExperts(keras.layers.Dense(4), 1, name="layer"),
        ],
        **kwargs,
    )


def one_row(row, w, e):
    if e < 2:
        hidden = np.tanh(row @ w["mlp/up_kernel"][e] + w["mlp/up_bias"][e])
        return hidden @ w["mlp/down_kernel"][e] + w["mlp/down_bias"][e]
    if e == 2:
        return 0 * row
    if e == 3:
        a = softmax(row @ w["constant/kernel"][0])
        return a[0] * row + a[1] * w["constant/constant"][0]
    if e == 4:
        return row
    kernel, bias = w["layer/expert_0/kernel"], w["layer/expert_0/bias"]
    return row @ kernel + bias


class MixedExpertsTest(BankTestCase):
    def setUp(self):
        super().setUp()
        self.rows = np.random.default_rng(5).normal(size=(10, 4))

    @parameterized.parameters((SIZES,), ((0, 3, 3, 0, 0, 3),))
    def test_against_one_row_at_a_time(self, sizes):
        layer = make()
        self.assertEqual(layer.num_experts, 6)
        self.check_bank(layer, self.rows, sizes, one_row)

    def test_max_group_size_reaches_the_banks_that_use_it(self):
        layer = make()
        self.check_bank(layer, self.rows, SIZES, one_row, max_group_size=2)

    def test_training_reaches_the_banks(self):
        layer = experts.MixedExperts(
            [
                experts.MLPExperts(1, 32, dropout=0.5),
                experts.LayerExperts(keras.layers.Dropout(0.5), 1),
            ]
        )
        sizes = ops.array((5, 5), "int32")
        inference = ops.convert_to_numpy(layer(self.rows, sizes))
        training = layer(self.rows, sizes, training=True)
        changed = ops.convert_to_numpy(training) != inference
        self.assertTrue(changed[:5].any() and changed[5:].any())

    def test_no_rows(self):
        self.check_no_rows(make(), (4,))

    def test_rows_of_higher_rank(self):
        layer = experts.MixedExperts(
            [
                experts.CopyExperts(1),
                experts.LayerExperts(
                    [keras.layers.Conv1D(4, 1, use_bias=False, name="conv")],
                    name="layer",
                ),
            ]
        )

        def row(row, w, e):
            return row @ w["layer/conv/kernel"][0] if e else row

        rows = np.random.default_rng(0).normal(size=(5, 3, 4))
        self.check_bank(layer, rows, (2, 2), row)

    def test_dtypes_and_saving(self):
        rows = self.rows.astype("float32")
        self.check_saving(make(), rows, (2, 0, 2, 2, 1, 3))

        def of(dtype):
            banks = [
                experts.GLUExperts(2, 5, dtype=dtype),
                experts.ConstantExperts(1, dtype=dtype),
                experts.CopyExperts(1, dtype=dtype),
            ]
            return experts.MixedExperts(banks, dtype=dtype)

        self.check_dtypes(of, rows, (3, 2, 2, 2))

    def test_errors(self):
        for banks in ([keras.layers.Dense(3)], ["glu"], "glu"):
            with self.assertRaisesRegex(ValueError, "`banks` must be a list"):
                experts.MixedExperts(banks)
        bank = experts.CopyExperts(1)
        for banks in ([], [bank, bank]):
            with self.assertRaisesRegex(ValueError, "at least one layer"):
                experts.MixedExperts(banks)
        layer = experts.MixedExperts(
            [bank, experts.GLUExperts(1, 4, output_dim=3)]
        )
        with self.assertRaisesRegex(ValueError, r"\(None, 4\), \(None, 3\)"):
            layer.build((None, 4))
