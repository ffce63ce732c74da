"""Soft MoE of google-research/vmoe: whole models on recorded arrays."""

from unittest import mock

from absl.testing import parameterized
from keras import ops

from keras_moe.layers import SoftMoE
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase
from tests.vision_cases import cases
from tests.vision_cases import soft_moe
from tests.vision_cases import vmoe

NAMED = cases.named(soft_moe.matches)
MODES = [
    (f"{name}_{'training' if prefix else 'inference'}", case, prefix)
    for name, case in NAMED
    for prefix in ("", "train/")
    if f"{prefix}y" in case.arrays
]


def draws(case, prefix):
    """Every block draws once; in inference none does."""
    noise = case.under("train/noise_unit/") if prefix else {}
    return recorded_draws(normal=[noise[key] for key in sorted(noise, key=int)])


class SoftMoEModelsTest(TestCase):
    in_graph = False

    # `y` is without the rounding to bfloat16 that the original does on the
    # way (`y_bfloat16_path`), and SoftMoE computes in the dtype asked for.
    @parameterized.named_parameters(MODES)
    def test_outputs_and_gradients(self, case, prefix):
        model = soft_moe.model_from_case(case)
        with draws(case, prefix):
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                model,
                case.arrays["x"],
                case.arrays["cotangent"],
                whole_paths=True,
                training=bool(prefix),
            )
        self.assert_relative(outputs, case.arrays[f"{prefix}y"])
        self.assert_relative(d_inputs, case.arrays[f"{prefix}grad/x"])
        vmoe.assert_gradients(self, d_weights, prefix, case)

    @parameterized.named_parameters(MODES)
    def test_routing(self, case, prefix):
        recorded = case.under(f"{prefix}route/")
        model = soft_moe.model_from_case(case)
        routings = []
        route = SoftMoE._route

        def spy(*args, **kwargs):
            routings.append(route(*args, **kwargs))
            return routings[-1]

        with mock.patch.object(SoftMoE, "_route", spy), draws(case, prefix):
            model(case.arrays["x"], training=bool(prefix))
        blocks = case.config["encoder"]["moe"]["layers"]
        self.assertLen(routings, len(blocks))
        for block, routing in zip(sorted(blocks), routings, strict=True):
            for kind in ("dispatch", "combine"):
                weights = getattr(routing, f"{kind}_weights")
                axis = 1 if kind == "dispatch" else (2, 3)
                total = ops.convert_to_numpy(ops.sum(weights, axis=axis))
                self.assertAllClose(total, total * 0 + 1, atol=1e-5)
                if f"{block}/{kind}" in recorded:
                    self.assert_relative(weights, recorded[f"{block}/{kind}"])
        self.assertEqual(model.losses, [])  # the original's is 0
        if f"{prefix}auxiliary_loss" in case.arrays:
            self.assertFalse(case.arrays[f"{prefix}auxiliary_loss"].any())
