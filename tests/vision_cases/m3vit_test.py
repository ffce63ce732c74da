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
from tests.recommendation_cases.cases import run
from tests.routing_cases.cases import dense_weights
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase
from tests.vision_cases import m3vit
from tests.vision_cases.dit_moe import images_last
from tests.vision_cases.dit_moe_test import named


class Calls:
    """The blocks with experts and the tasks, in the order of the calls.

    It is the order in which recorded noise is drawn.
    """

    def __init__(self, case, arrays, training, model):
        self.case, self.order = case, []
        with mock.patch.object(EncoderBlock, "call", self.spy(model)):
            model(images_last(arrays["x"]))
        self.noise = []
        if training:
            prefix = "train/noise_unit/"
            self.noise = [
                arrays[name]
                for name in (f"{prefix}{b}/task{t}" for b, t in self.order)
                if name in arrays
            ]

    def spy(self, model):
        call = EncoderBlock.call
        vectors = m3vit.task_vectors(model, len(self.case["tasks"]))

        def called(block, x, context=None, router_condition=None, **kwargs):
            task = None
            if context is not None:
                task = int(ops.convert_to_numpy(context)[0])
            if router_condition is not None:
                vector = ops.convert_to_numpy(router_condition)[0]
                task = int(np.abs(vectors - vector).sum(1).argmin())
            if task is not None:
                number = int(block.name.removeprefix("block_"))
                self.order.append((number, self.case["tasks"][task]))
            return call(block, x, context, router_condition, **kwargs)

        return called


class OriginalLoad:
    """The loss of the load, as the original computes it."""

    def __init__(self, config):
        self.top_k, self.noise = config["moe_top_k"], []
        self.stddev = config["vmoe_noisy_std"] / config["moe_experts"]
        self.calls = 0

    def __call__(self, routing, mask=None):
        clean, probs, top_k = routing.logits, routing.probs, self.top_k
        if not self.noise:
            chosen = ops.one_hot(routing.expert_indices, probs.shape[-1])
            load = ops.sum(chosen, axis=(0, 1))
        else:
            number = self.calls % len(self.noise)
            self.calls += 1
            noise = ops.convert_to_tensor(self.noise[number])
            noisy = clean + self.stddev * noise
            order = ops.top_k(probs, top_k + 1)[0]
            inside, outside = order[:, top_k:], order[:, top_k - 1 : top_k]
            threshold = ops.where(noisy > inside, inside, outside)
            load = (clean - threshold) / self.stddev
            load = ops.sum(0.5 * (1 + ops.erf(load / np.sqrt(2))), axis=0)
        variance = ops.var(load) * (len(load) / (len(load) - 1))
        return 0.01 * variance / (ops.mean(load) ** 2 + 1e-10)


class Outputs:
    """A model whose outputs are by name, with its losses of each task."""

    def __init__(self, model, training, calls):
        self.model, self.training, self.calls = model, training, calls
        self.trainable_variables = model.trainable_variables
        self.non_trainable_variables = model.non_trainable_variables

    def __call__(self, inputs):
        outputs = self.model(inputs["x"], training=self.training)
        return self.named(outputs, self.model.losses)

    def stateless_call(self, weights, state, inputs):
        outputs, state, losses = self.model.stateless_call(
            *(weights, state, inputs["x"]),
            training=self.training,
            return_losses=True,
        )
        return self.named(outputs, losses), state

    def named(self, outputs, losses):
        """Each call has two losses."""
        found = {f"y/{task}": tokens for task, tokens in outputs.items()}
        for number, (_, task) in enumerate(self.calls.order if losses else ()):
            name = f"auxiliary_loss/task{task}"
            own = sum(losses[2 * number : 2 * number + 2])
            found[name] = found.get(name, 0.0) + own
        return found


class M3ViTCasesTest(TestCase):
    def test_number_of_cases(self):
        self.assertGreaterEqual(len(list(named(m3vit.matches))), 2)

    @parameterized.named_parameters(named(m3vit.matches))
    def test_case(self, case, arrays, training):
        loss = OriginalLoad(case["config"])
        model, recorded = m3vit.model_from_case(case, arrays, [loss])
        calls = Calls(case, arrays, training, model)
        loss.noise = calls.noise
        inputs = {"x": images_last(arrays["x"])}
        cotangents = {
            f"y/task{task}": arrays[f"cotangent/task{task}"]
            for task in case["tasks"]
        }
        if training:
            for task in case["tasks"]:
                name = f"auxiliary_loss/task{task}"
                cotangents[name] = np.ones((), "float32")
        with recorded_draws(normal=calls.noise):
            found, d_inputs, d_weights = run(
                Outputs(model, training, calls),
                inputs,
                cotangents,
            )
        found["grad/x"] = np.moveaxis(d_inputs["x"], -1, 1)
        for name, gradient in recorded.gradients(d_weights).items():
            found[f"grad/w/{name}"] = gradient
        found.update(self.inside(case, model, inputs["x"], calls, training))
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
        self.assertGreaterEqual(compared, 10 if training else 14)

    def inside(self, case, model, images, calls, training):
        """The tokens after each block, and the routing."""
        routings, tokens = [], {}
        routed, call = MoE._routed, EncoderBlock.call

        def spy_routing(layer, tokens, routing, training):
            routings.append(dense_weights(routing, layer.num_experts))
            return routed(layer, tokens, routing, training)

        def spy_block(block, *args, **kwargs):
            outputs = call(block, *args, **kwargs)
            tokens.setdefault(block.name, []).append(outputs)
            return outputs

        with (
            mock.patch.object(MoE, "_routed", spy_routing),
            mock.patch.object(EncoderBlock, "call", spy_block),
            recorded_draws(normal=calls.noise),
        ):
            model(images, training=training)
        # Those of the first task: all blocks take the tasks in one order.
        tasks = [task for _, task in calls.order]
        first = tasks[: len(case["tasks"])].index(case["tasks"][0])
        found = {}
        for number in range(case["config"]["depth"]):
            outputs = tokens[f"block_{number}"]
            found[f"features/{number}"] = ops.convert_to_numpy(
                outputs[first if len(outputs) > 1 else 0]
            )
        for (block, task), routing in zip(calls.order, routings, strict=True):
            found[f"route/{block}/task{task}/combine"] = routing
        return found
