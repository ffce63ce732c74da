"""MoE Jetpack: whole models on recorded arrays.

The original adds its noise in inference too, unless it is switched off, as it
was for `y`; ours is only in training.
"""

from unittest import mock

from absl.testing import parameterized
from keras import ops

from keras_moe.layers import SoftMoE
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase
from tests.vision_cases import cases
from tests.vision_cases import sphero_moe
from tests.vision_cases.soft_moe_torch import images_last

NAMED = cases.named(sphero_moe.matches)
MODES = [
    (f"{name}_{'training' if prefix else 'inference'}", case, prefix)
    for name, case in NAMED
    for prefix in ("", "train/")
    if f"{prefix}y" in case.arrays
]


def draws(case, prefix):
    noise = case.under("train/noise_unit/") if prefix else {}
    return recorded_draws(normal=[noise[key] for key in sorted(noise, key=int)])


class SpheroMoEModelsTest(TestCase):
    in_graph = False

    @parameterized.named_parameters(MODES)
    def test_outputs_and_gradients(self, case, prefix):
        filled = sphero_moe.model_from_case(case)
        with draws(case, prefix):
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                filled.model,
                images_last(case.arrays["x"]),
                case.arrays["cotangent"],
                whole_paths=True,
                training=bool(prefix),
            )
        self.assert_relative(outputs, case.arrays[f"{prefix}y"])
        self.assert_relative(
            d_inputs, images_last(case.arrays[f"{prefix}grad/x"])
        )
        recorded = case.under(f"{prefix}grad/w/")
        filled.assert_gradients(self, d_weights, recorded)

    @parameterized.named_parameters(NAMED)
    def test_layers(self, case):
        prefix = "train/" if "train/y" in case.arrays else ""
        model = sphero_moe.model_from_case(case).model
        seen, routings = [], []
        call, route = SoftMoE.call, SoftMoE._route

        def spy(layer, inputs, **kwargs):
            seen.append((inputs, call(layer, inputs, **kwargs)))
            return seen[-1][1]

        def spy_route(*args, **kwargs):
            routings.append(route(*args, **kwargs))
            return routings[-1]

        with (
            mock.patch.object(SoftMoE, "call", spy),
            mock.patch.object(SoftMoE, "_route", spy_route),
            draws(case, prefix),
        ):
            model(images_last(case.arrays["x"]), training=bool(prefix))
        blocks = sphero_moe.moe_blocks(case)
        for block, (inputs, outputs) in zip(blocks, seen, strict=True):
            recorded = case.under(f"{prefix}moe/{block}/")
            if recorded:
                self.assert_relative(inputs, recorded["in"])
                self.assert_relative(outputs, recorded["out"])
        for routing in routings:
            weights = ops.convert_to_numpy(routing.combine_weights)
            self.assertTrue((weights == 0).any())
