"""ZeroExperts, CopyExperts, ConstantExperts, and MoE++ as it was recorded."""

import glob
import json
import os

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import experts
from tests.experts.bank_case import BankTestCase
from tests.experts.bank_case import compiled
from tests.token_loop import softmax

ROUTING = os.path.join(os.path.dirname(__file__), "..", "data", "routing")
SIZES = (2, 0, 3)


def constant(row, w, e):
    a = softmax(row @ w["kernel"][e])
    return a[0] * row + a[1] * w["constant"][e]


class ZeroComputationTest(BankTestCase):
    def setUp(self):
        super().setUp()
        self.rows = np.random.default_rng(4).normal(size=(6, 4))

    @parameterized.parameters(experts.CopyExperts, experts.ZeroExperts)
    def test_without_weights(self, kind):
        rows = self.rows.astype("float32")
        layer = kind(3, name="bank")
        self.assertEqual(layer.compute_output_shape((None, 4)), (None, 4))
        self.assertEqual(
            tuple(layer(np.ones((5, 2, 3)), ops.array(SIZES)).shape), (5, 2, 3)
        )
        self.assertEqual(layer.weights, [])
        self.check_dtypes(lambda dtype: kind(3, dtype=dtype), rows, SIZES)
        self.check_saving(kind(3), rows, (2, 0, 4))
        with self.assertRaisesRegex(ValueError, "num_experts=0"):
            kind(0)
        with self.assertRaises(TypeError):
            kind(2, kernel_regularizer="l2")  # there is no kernel

    def test_copy(self):
        layer = experts.CopyExperts(3)
        self.check_bank(layer, self.rows, SIZES, lambda row, w, e: row)
        self.check_no_rows(layer, (4,))

    def test_zero(self):
        rows = np.full((6, 4), np.nan, "float32")
        for call in (experts.ZeroExperts(3), compiled_zero):
            out = call(rows, ops.array(SIZES, "int32"))
            self.assertAllEqual(out, np.zeros((6, 4)))
        none = experts.ZeroExperts(3)(rows[:0], ops.array([0, 0, 0]))
        self.assertEqual(tuple(none.shape), (0, 4))

    def test_constant(self):
        layer = experts.ConstantExperts(3, name="constant")
        self.check_bank(layer, self.rows, SIZES, constant)
        self.assertEqual(
            {v.path: tuple(v.shape) for v in layer.weights},
            {"constant/kernel": (3, 4, 2), "constant/constant": (3, 4)},
        )
        self.assertGreater(np.abs(layer.constant).max(), 0)

    def test_constant_otherwise(self):
        def make(dtype):
            return experts.ConstantExperts(
                3,
                constant_initializer="ones",
                constant_regularizer="l1",
                constant_constraint="unit_norm",
                kernel_regularizer="l2",
                dtype=dtype,
            )

        layer = make("float32")
        self.check_no_rows(layer, (4,))
        self.assertLen(layer.losses, 2)
        self.assertAllClose(
            ops.convert_to_numpy(layer.losses[1]), 0.01 * 12, rtol=1e-5
        )
        self.check_saving(make("float32"), self.rows.astype("float32"), SIZES)
        self.check_dtypes(make, self.rows.astype("float32"), SIZES)
        with self.assertRaisesRegex(ValueError, r"rows_shape=\(None, 2, 3\)"):
            make("float32").build((None, 2, 3))


def compiled_zero(rows, sizes):
    layer = experts.ZeroExperts(3)
    layer.build(rows.shape)
    return compiled(layer, rows, sizes)


def moepp_cases():
    paths = sorted(glob.glob(os.path.join(ROUTING, "moepp_*.npz")))
    return [(os.path.basename(path)[:-4], path) for path in paths]


class MoEPlusPlusTest(BankTestCase):
    @parameterized.named_parameters(moepp_cases())
    def test_recorded(self, path):
        with np.load(path) as arrays:
            arrays = dict(arrays)
        with open(path[:-4] + ".json") as file:
            config = json.load(file)["config"]
        dim, num_experts = config["D"], config["E"]
        num_full = num_experts - 4

        def weight(e, name):
            return arrays[f"w/moe.experts.experts.{e}.{name}"]

        full = experts.LayerExperts(keras.layers.Dense(dim), num_full)
        constants = experts.ConstantExperts(2)
        layer = experts.MixedExperts(
            [full, constants, experts.CopyExperts(1), experts.ZeroExperts(1)]
        )
        layer.build((None, dim))
        for e in range(num_full):
            full.layers[e].kernel.assign(weight(e, "lin.weight").T)
            full.layers[e].bias.assign(weight(e, "lin.bias"))
        constant = range(num_full, num_full + 2)
        constants.kernel.assign(
            np.stack([weight(e, "wg.weight").T for e in constant])
        )
        constants.constant.assign(
            np.stack([weight(e, "constant") for e in constant])
        )
        tokens = arrays["x"].reshape(-1, dim)
        # MoE++ doubles what experts are given, unless told otherwise.
        single = config.get("moe_use_mixtral_gating") or config.get(
            "moe_feature_no_mul_topk"
        )
        given = tokens if single else 2 * tokens
        # Every choice with a weight, sorted by expert.
        token, expert = np.nonzero(arrays["combine"])
        order = np.argsort(expert, kind="stable")
        token, expert = token[order], expert[order]
        sizes = np.bincount(expert, minlength=num_experts)
        rows = layer(given[token], ops.array(sizes, "int32"))
        out = np.zeros(tokens.shape)
        weights = arrays["combine"][token, expert]
        np.add.at(out, token, weights[:, None] * ops.convert_to_numpy(rows))
        self.assert_relative(out, arrays["y"].reshape(-1, dim))

    def test_there_are_cases(self):
        self.assertGreaterEqual(len(moepp_cases()), 4)
