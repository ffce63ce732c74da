"""Soft MoE of bwconrad and of lucidrains: whole models on recorded arrays."""

from unittest import mock

from absl.testing import parameterized

from keras_moe.layers import SoftMoE
from tests.test_case import TestCase
from tests.vision_cases import cases
from tests.vision_cases import soft_moe_torch
from tests.vision_cases.soft_moe_torch import images_last

NAMED = cases.named(soft_moe_torch.matches)


class SoftMoETorchModelsTest(TestCase):
    in_graph = False

    @parameterized.named_parameters(NAMED)
    def test_outputs_and_gradients(self, case):
        filled = soft_moe_torch.model_from_case(case)
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            filled.model,
            images_last(case.arrays["x"]),
            case.arrays["cotangent"],
            whole_paths=True,
        )
        self.assert_relative(outputs, case.arrays["y"])
        self.assert_relative(d_inputs, images_last(case.arrays["grad/x"]))
        filled.assert_gradients(self, d_weights, case.under("grad/w/"))

    @parameterized.named_parameters(NAMED)
    def test_layers(self, case):
        model = soft_moe_torch.model_from_case(case).model
        seen = []
        call = SoftMoE.call

        def spy(layer, inputs, **kwargs):
            seen.append((inputs, call(layer, inputs, **kwargs)))
            return seen[-1][1]

        with mock.patch.object(SoftMoE, "call", spy):
            model(images_last(case.arrays["x"]))
        blocks = soft_moe_torch.moe_blocks(case)
        for block, (inputs, outputs) in zip(blocks, seen, strict=True):
            recorded = case.under(f"moe/{block}/")
            if recorded:
                self.assert_relative(inputs, recorded["in"])
                self.assert_relative(outputs, recorded["out"])
        self.assertEqual(model.losses, [])
