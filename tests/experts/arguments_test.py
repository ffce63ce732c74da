"""Errors of the experts' arguments, and float64 through every bank."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import experts
from tests import token_loop
from tests.experts.low_rank_experts_test import one_row
from tests.test_case import TestCase


class ArgumentsTest(TestCase):
    @parameterized.parameters(
        *({"num_experts": x} for x in (True, "4", float("nan"))),
        *({"intermediate_dim": x} for x in (True, "8", 8.0)),
        *({"output_dim": x} for x in (True, "8")),
        *({"dropout": x} for x in ("x", True, float("nan"))),
        *({"use_bias": x} for x in ("no", 1, None)),
        *({"limit": x} for x in (True, "x", float("nan"))),
        *({"up_shift": x} for x in ("x", float("nan"), True, None)),
        *({"rank": x} for x in (True, "8")),
        *({"alpha": x} for x in (True, "x", float("nan"))),
        *({"gated": x} for x in ("no", 1)),
        {"freeze_shared": "no"},
        {"activation": "sillu"},
        {"kernel_initializer": "glorot"},
        {"lora_a_initializer": "he"},
        {"bank_regularizer": "l3"},
        {"bias_constraint": "norm"},
    )
    def test_feed_forward(self, **wrong):
        ((name, value),) = wrong.items()
        arguments = {"num_experts": 4, "intermediate_dim": 8, **wrong}
        low_rank = {"rank", "alpha", "gated", "freeze_shared"}
        kinds = [experts.LowRankExperts]
        if name not in low_rank and not name.startswith("lora"):
            kinds.append(experts.GLUExperts)
        for kind in kinds:
            with self.assertRaises(ValueError) as caught:
                kind(**arguments)
            self.assertIn(f"`{name}` must", str(caught.exception))
            self.assertIn(f"{name}={value!r}", str(caught.exception))

    def test_other_banks(self):
        for make in (
            lambda: experts.ZeroExperts(True),
            lambda: experts.LayerExperts(keras.layers.Dense(2), True),
            lambda: experts.LayerExperts([keras.layers.Dense(2)], True),
        ):
            with self.assertRaisesRegex(ValueError, "num_experts=True"):
                make()
        with self.assertRaisesRegex(ValueError, "constant_constraint='x'"):
            experts.ConstantExperts(2, constant_constraint="x")

    def test_numpy_bools(self):
        self.assertTrue(experts.GLUExperts(2, 4, use_bias=np.True_).use_bias)

    def test_a_forced_implementation_that_takes_no_such_operands(self):
        if keras.config.backend() != "torch":
            self.skipTest("only torch has one that depends on shapes")
        bank = experts.GLUExperts(4, 8, implementation="grouped_mm")
        with self.assertRaisesRegex(ValueError, "`implementation`.*16 bytes"):
            bank.build((None, 5))
        bank = experts.GLUExperts(
            4, 8, implementation="grouped_mm", dtype="float64"
        )
        with self.assertRaisesRegex(ValueError, "`implementation`.*float64"):
            bank.build((None, 8))


class Float64Test(TestCase):
    @parameterized.parameters(
        *({"limit": limit} for limit in (None, 0.3)), {"use_bias": True}
    )
    def test_feed_forward(self, **kwargs):
        if keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 by default")
        x = np.random.default_rng(0).normal(size=(6, 4))
        bank = experts.GLUExperts(1, 16, dtype="float64", **kwargs)
        out = bank(ops.array(x), ops.array([6], "int32"))
        gate, up, down = (
            ops.convert_to_numpy(kernel)[0]
            for kernel in (bank.gate_kernel, bank.up_kernel, bank.down_kernel)
        )
        gate, up = x @ gate, x @ up
        if kwargs.get("limit"):
            gate = np.minimum(gate, kwargs["limit"])
            up = np.clip(up, -kwargs["limit"], kwargs["limit"])
        wanted = (gate / (1 + np.exp(-gate)) * up) @ down
        self.assertLess(np.abs(ops.convert_to_numpy(out) - wanted).max(), 1e-14)

    @parameterized.parameters(
        (experts.MLPExperts, {"activation": "relu"}),
        (experts.MLPExperts, {"activation": "tanh", "output_dim": 2}),
        (experts.LowRankExperts, {"rank": 2, "alpha": 3}),
        (experts.LowRankExperts, {"rank": 2, "gated": False}),
    )
    def test_several_experts(self, bank_class, kwargs):
        if keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 by default")
        if bank_class is experts.LowRankExperts:
            kwargs = {**kwargs, "lora_b_initializer": "he_uniform"}
        bank = bank_class(
            *(3, 5),
            use_bias=True,
            bias_initializer="normal",
            dtype="float64",
            **kwargs,
        )
        x = np.random.default_rng(0).normal(size=(6, 4))
        out = ops.convert_to_numpy(bank(x, ops.array([3, 0, 3], "int32")))
        weights = {
            v.name: ops.convert_to_numpy(v) for v in bank.trainable_variables
        }
        self.assertEqual({w.dtype.name for w in weights.values()}, {"float64"})
        if bank_class is experts.LowRankExperts:
            formula = one_row(2, kwargs.get("alpha"), bank.gated, "silu")
        else:
            named = {f"experts/{name}": w for name, w in weights.items()}

            def formula(row, weights, e):
                return token_loop.expert(row, named, e, kwargs["activation"])

        wanted = [
            formula(row, weights, e)
            for row, e in zip(x, (0, 0, 0, 2, 2, 2), strict=True)
        ]
        self.assertAllClose(out, np.stack(wanted), rtol=0, atol=1e-13)
