"""Soft MoE of vmoe and of soft-moe-pytorch, on recorded arrays."""

from unittest import mock

import numpy as np
from keras import ops

from tests import token_loop
from tests.moe.soft_moe_test import soft_moe
from tests.routing_cases.cases import DATA
from tests.routing_cases.cases import LinearExperts
from tests.routing_cases.cases import RecordedTest
from tests.routing_cases.cases import load
from tests.routing_cases.soft_moe import draws_of
from tests.routing_cases.soft_moe import is_vmoe
from tests.routing_cases.soft_moe import layer_from_case
from tests.routing_cases.soft_moe import matches
from tests.routing_cases.soft_moe import router_from_case
from tests.routing_cases.soft_moe import router_options
from tests.routing_cases.soft_moe import variables_from_case


def rows_of_experts(config, arrays, call):
    """What the experts of a layer are given, expert by expert."""
    rows = []
    spied = LinearExperts.call

    def call_experts(self, inputs, *args, **kwargs):
        rows.append(ops.convert_to_numpy(inputs))
        return spied(self, inputs, *args, **kwargs)

    with mock.patch.object(LinearExperts, "call", call_experts):
        layer_from_case(config, arrays)(arrays["x"], **call)
    return rows[-1]


class SoftMoECasesTest(RecordedTest):
    def assert_close(self, actual, expected, tolerance=1e-5):
        """Relative to the largest entry, however small it is."""
        actual = ops.convert_to_numpy(actual)
        self.assertEqual(actual.shape, expected.shape)
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=tolerance * np.abs(expected).max()
        )

    def each_case(self):
        found = load(matches)
        for name, config, arrays in found:
            with self.subTest(name), draws_of(arrays):
                mask = arrays.get("mask")
                call = {
                    "mask": None if mask is None else ops.array(mask),
                    "training": "noise_unit" in arrays
                    or "gumbel_uniform" in arrays,
                }
                yield name, config, arrays, call

    def test_only_these_match(self):
        names = {name for name, *_ in load(matches)}
        prefixes = ("vmoe_soft_moe_", "soft_moe_pytorch_")
        ours = {p.stem for p in DATA.glob("*.npz")}
        self.assertEqual(
            names, {name for name in ours if name.startswith(prefixes)}
        )
        for prefix in prefixes:
            self.assertTrue(any(name.startswith(prefix) for name in names))

    def test_weights_and_slots(self):
        for _, config, arrays, call in self.each_case():
            router = router_from_case(config, arrays)
            routing = router(arrays["x"], **call)
            for name in ("dispatch", "combine"):
                if name in arrays:
                    self.assert_close(
                        getattr(routing, f"{name}_weights"), arrays[name]
                    )
            rows = rows_of_experts(config, arrays, call)
            slots = arrays["slots"]
            if not is_vmoe(config, arrays):  # (B, E, P, D)
                slots = slots.swapaxes(0, 1)
            self.assert_close(rows, slots.reshape(rows.shape))

    def test_outputs_and_gradients(self):
        for _, config, arrays, call in self.each_case():
            layer = layer_from_case(config, arrays)
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                layer, arrays["x"], arrays["cotangent"], **call
            )
            wanted = {
                name.removeprefix("grad_y/"): value
                for name, value in arrays.items()
                if name.startswith("grad_y/")
            }
            recorded = {
                "x": d_inputs,
                "expert/W": d_weights["experts/kernel"],
                "expert/b": d_weights["experts/bias"],
                "mu": d_weights["router/slot_kernel"],
                "scale": d_weights.get("router/scale"),
                "slot_embeds": np.moveaxis(
                    d_weights["router/slot_kernel"], 0, -1
                ),
            }
            self.assertLessEqual({"x"}, set(wanted))
            if "mask" not in arrays:
                self.assert_close(outputs, arrays["y"])
                for name, gradient in wanted.items():
                    self.assert_close(recorded[name], gradient)
            else:
                self.assert_masked(config, arrays, outputs, recorded)
            self.assertEqual(layer.losses, [])

    def assert_masked(self, config, arrays, outputs, gradients):
        """soft-moe-pytorch gives a masked token the mean of all slots.

        We give it zero, so outputs are compared where tokens are real, and
        gradients, in which theirs has a part, with differences of the loop.
        """
        mask = arrays["mask"]
        self.assertFalse(mask.all())
        self.assert_close(outputs[mask], arrays["y"][mask])
        self.assertFalse(outputs[~mask].any())
        options = router_options(config, arrays)

        def objective(inputs):
            kernel = inputs["slot_embeds"].transpose(2, 0, 1)
            y = soft_moe(
                inputs["x"],
                {**variables_from_case(arrays), "router/slot_kernel": kernel},
                mask,
                kind=options["normalization"],
                epsilon=options["epsilon"],
                mixed=options["mix_normalized"],
            )
            return np.sum(y * arrays["cotangent"])

        wanted = token_loop.gradients(
            objective, {name: arrays[name] for name in ("x", "slot_embeds")}
        )
        for name, gradient in wanted.items():
            self.assert_close(gradients[name], gradient)
