"""Swin-MoE of microsoft/Swin-Transformer: whole models on recorded arrays.

The load loss of the original compares probabilities with logits, a mistake that
ours does not have: `MixedLoadLoss` is put in its place here. The original adds
its losses in inference, too; ours are those of training, where without noise
all is the same.
"""

from unittest import mock

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MoE
from tests.routing_cases.cases import combine_matrix
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase
from tests.vision_cases import cases
from tests.vision_cases import swin_moe

NAMED = cases.named(swin_moe.matches)
MODES = [
    (f"{name}_{'training' if prefix else 'inference'}", case, prefix)
    for name, case in NAMED
    for prefix in ("", "train/")
    if f"{prefix}y" in case.arrays
]


def draws_of(case, prefix):
    """The draws of each block; for inference, zeros."""
    config = swin_moe.config_of(case)
    found = []
    for _, name in swin_moe.moe_blocks(config):
        noise = case.arrays.get(f"{prefix}noise_unit/{name}")
        if not prefix or noise is None:
            shape = case.arrays[f"{prefix}route/{name}/combine"].shape
            noise = np.zeros(shape, "float32")
        found.append(noise)
    return found


def drawn(case, prefix):
    draws = draws_of(case, prefix)
    if not swin_moe.config_of(case)["gate_noise"]:
        draws = []
    return recorded_draws(normal=draws)


class SwinMoEModelsTest(TestCase):
    in_graph = False

    def model_of(self, case, prefix):
        """A model with all losses of the original."""
        config = swin_moe.config_of(case)
        model = swin_moe.model_from_case(case)
        if config["is_gshard_loss"]:
            return model
        for (block, _), draws in zip(
            swin_moe.moe_blocks(config), draws_of(case, prefix), strict=True
        ):
            layer = model.backbone.block(block).feed_forward
            layer.routing_losses.append(
                swin_moe.MixedLoadLoss(
                    config["aux_loss_weight"] / 2,
                    config["top_value"],
                    config["gate_noise"] / config["num_local_experts"],
                    draws,
                )
            )
        return model

    @parameterized.named_parameters(MODES)
    def test_outputs_and_gradients(self, case, prefix):
        model = self.model_of(case, prefix)
        with drawn(case, prefix):
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                model,
                case.arrays["x"],
                case.arrays["cotangent"],
                losses=True,
                whole_paths=True,
                training=True,
            )
        self.assert_relative(outputs, case.arrays[f"{prefix}y"])
        self.assert_scaled(d_inputs, case.arrays[f"{prefix}grad/x"])
        found = swin_moe.gradients_by_name(model, case, d_weights)
        recorded = case.under(f"{prefix}grad/w/")
        self.assertGreaterEqual(len(recorded), 3)
        for name, wanted in recorded.items():
            with self.subTest(name):
                actual = found[name].reshape(wanted.shape)
                self.assert_scaled(actual, wanted)

    def assert_scaled(self, actual, wanted):
        scale = np.abs(wanted).max()
        self.assert_relative(actual / scale, wanted / scale)

    @parameterized.named_parameters(MODES)
    def test_routing_and_losses(self, case, prefix):
        config, model = swin_moe.config_of(case), self.model_of(case, prefix)
        routed = []
        watched = MoE._routed

        def spy(layer, tokens, routing, *args):
            routed.append((layer, tokens, routing))
            return watched(layer, tokens, routing, *args)

        with mock.patch.object(MoE, "_routed", spy), drawn(case, prefix):
            model(case.arrays["x"], training=True)
        total = ops.convert_to_numpy(sum(model.losses))
        self.assert_scaled(total, case.arrays[f"{prefix}auxiliary_loss"])
        for (_, name), (layer, tokens, routing) in zip(
            swin_moe.moe_blocks(config), routed, strict=True
        ):
            self.assert_routing(
                case.under(f"{prefix}route/{name}/"), layer, routing
            )
            loss = sum(
                ops.convert_to_numpy(loss(routing, None, tokens.positions[0]))
                for loss in layer.routing_losses
            )
            self.assert_scaled(
                loss / config["aux_loss_weight"],
                case.arrays[f"{prefix}auxiliary_loss/{name}"],
            )

    def assert_routing(self, recorded, layer, routing):
        self.assert_relative(routing.probs, recorded["probabilities"])
        combine = combine_matrix(layer, routing, 1, training=True)
        self.assert_relative(combine, recorded["combine"])
        # A slot is a place in a queue, here a row of a sorted batch: which
        # tokens have one is compared.
        self.assertAllEqual(combine > 0, recorded["slot"] >= 0)
        tokens, experts = recorded["slot"].shape
        top_k = routing.expert_indices.shape[-1]
        rows = layer.capacity.rows_per_expert(tokens, experts, top_k, True)
        self.assertEqual(rows, recorded["capacity"])

    @parameterized.named_parameters(NAMED)
    def test_inference(self, case):
        model = swin_moe.model_from_case(case)
        self.assert_relative(
            model(case.arrays["x"], training=False), case.arrays["y"]
        )
        self.assertEqual(model.losses, [])
