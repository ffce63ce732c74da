"""Errors of the experts' arguments, and float64 through every bank."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import experts
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
