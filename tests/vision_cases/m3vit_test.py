"""`MultiTaskVisionMoE` against what M3ViT did, on recorded arrays.

The original has no norm after the last block, and adds a loss of the experts'
load to that of their importance. Without noise the load counts tokens, and has
no gradient. With noise it compares probabilities with logits: that is a bug,
which `OriginalLoad` repeats here, and which the library does not have.
"""

from unittest import mock

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import EncoderBlock
from keras_moe.layers import MoE
from keras_moe.routers import Routing
from tests.recommendation_cases.cases import run
from tests.routing_cases.cases import dense_weights
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase
from tests.vision_cases import m3vit
from tests.vision_cases.dit_moe import images_last
from tests.vision_cases.dit_moe_test import WithLosses
from tests.vision_cases.dit_moe_test import named


def noise_of(case, arrays, training):
    """The recorded noise of each block, for the tokens of all tasks."""
    found = []
    for block in range(1, case["config"]["depth"], 2):
        name = f"train/noise_unit/{block}/task"
        if training and f"{name}{case['tasks'][0]}" in arrays:
            parts = [arrays[f"{name}{task}"] for task in case["tasks"]]
            found.append(np.concatenate(parts))
    return found


class OriginalLoad:
    """The loss of the load, as the original computes it.

    It is called for the tasks one after the other.
    """

    def __init__(self, case, noise):
        config = case["config"]
        self.top_k, self.noise = config["moe_top_k"], []
        self.stddev = config["vmoe_noisy_std"] / config["moe_experts"]
        for both in noise:
            self.noise += np.split(both, len(case["tasks"]))
        self.calls = 0

    def __call__(self, routing, mask=None):
        clean, probs, top_k = routing.logits, routing.probs, self.top_k
        if not self.noise:
            chosen = ops.one_hot(routing.expert_indices, probs.shape[-1])
            load = ops.sum(chosen, axis=(0, 1))
        else:
            noise = self.noise[self.calls % len(self.noise)]
            self.calls += 1
            noisy = clean + self.stddev * ops.convert_to_tensor(noise)
            order = ops.top_k(probs, top_k + 1)[0]
            inside, outside = order[:, top_k:], order[:, top_k - 1 : top_k]
            threshold = ops.where(noisy > inside, inside, outside)
            load = (clean - threshold) / self.stddev
            load = ops.sum(0.5 * (1 + ops.erf(load / np.sqrt(2))), axis=0)
        number = load.shape[0]
        variance = ops.var(load) * (number / (number - 1))
        return 0.01 * variance / (ops.mean(load) ** 2 + 1e-10)


class Outputs(WithLosses):
    """A model that is called with a dict."""

    def __call__(self, inputs):
        return super().__call__(inputs["x"])

    def stateless_call(self, weights, state, inputs):
        return super().stateless_call(weights, state, inputs["x"])


class M3ViTCasesTest(TestCase):
    def test_number_of_cases(self):
        self.assertGreaterEqual(len(list(named(m3vit.matches))), 2)

    @parameterized.named_parameters(named(m3vit.matches))
    def test_case(self, case, arrays, training):
        noise = noise_of(case, arrays, training)
        loss = OriginalLoad(case, noise)
        model, recorded = m3vit.model_from_case(case, arrays, [loss])
        inputs = {"x": images_last(arrays["x"])}
        cotangents = {
            f"task{task}": arrays[f"cotangent/task{task}"]
            for task in case["tasks"]
        }
        if training:
            cotangents["auxiliary_loss"] = np.ones((), "float32")
        with recorded_draws(normal=noise):
            outputs, d_inputs, d_weights = run(
                Outputs(model, training), inputs, cotangents
            )
        if training:
            total = sum(
                arrays[f"train/auxiliary_loss/task{task}"]
                for task in case["tasks"]
            )
            self.assert_relative(outputs["auxiliary_loss"], total)
        found = {f"y/{name}": value for name, value in outputs.items()}
        found["grad/x"] = np.moveaxis(d_inputs["x"], -1, 1)
        for name, gradient in recorded.gradients(d_weights).items():
            found[f"grad/w/{name}"] = gradient
        with recorded_draws(normal=noise):
            found.update(self.inside(case, model, inputs["x"], training))
        compared = 0
        for name, value in arrays.items():
            if name.startswith("train/") != training:
                continue
            name = name.removeprefix("train/")
            if name in found:
                with self.subTest(name):
                    self.assertEqual(found[name].shape, value.shape)
                    scale = np.abs(value).max()
                    error = np.abs(found[name] - value).max()
                    self.assertLessEqual(error, 1e-5 * scale)
                compared += 1
        self.assertGreaterEqual(compared, 8 if training else 12)

    def inside(self, case, model, images, training):
        """The tokens after each block, the routing, and losses by task."""
        routings, tokens = [], []
        routed, call = MoE._routed, EncoderBlock.call

        def spy_routing(layer, tokens, routing, *args):
            routings.append((layer, routing))
            return routed(layer, tokens, routing, *args)

        def spy_block(block, *args, **kwargs):
            outputs = call(block, *args, **kwargs)
            tokens.append(ops.convert_to_numpy(outputs))
            return outputs

        with (
            mock.patch.object(MoE, "_routed", spy_routing),
            mock.patch.object(EncoderBlock, "call", spy_block),
        ):
            model(images, training=training)
        found = {
            f"features/{number}": x[: len(images)]  # of the first task
            for number, x in enumerate(tokens)
        }
        losses = dict.fromkeys(case["tasks"], 0.0)
        for number, (layer, routing) in enumerate(routings):
            size = len(routing.logits) // len(case["tasks"])
            for place, task in enumerate(case["tasks"]):
                part = slice(place * size, (place + 1) * size)
                own = Routing(*(field[part] for field in routing))
                found[f"route/{2 * number + 1}/task{task}/combine"] = (
                    dense_weights(own, layer.num_experts)
                )
                losses[task] += sum(
                    ops.convert_to_numpy(loss.loss(own))
                    for loss in layer.routing_losses
                )
        for task, loss in losses.items():
            found[f"auxiliary_loss/task{task}"] = loss
        return found
