"""`DiTMoEBackbone` against what DiT-MoE did, on recorded arrays.

Not compared is `as_shipped/grad/x`: in inference the original computes its
routed experts without a gradient. `guided/y`, where it is recorded, is guided
in the first three channels only, as the original does whatever the number of
channels; ours guides all of them.
"""

import json
import pathlib
from unittest import mock

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MoE
from tests.recommendation_cases.cases import run
from tests.routing_cases.cases import dense_weights
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase
from tests.vision_cases import dit_moe

DATA = pathlib.Path(__file__).parents[1] / "data" / "vision"


def named(matches):
    """Each case in inference, and in training where that is recorded."""
    for path in sorted(DATA.glob("*.json")):
        case = json.loads(path.read_text())
        if matches(case):
            with np.load(path.with_suffix(".npz")) as arrays:
                arrays = dict(arrays)
            yield path.stem, case, arrays, False
            if any(name.startswith("train/") for name in arrays):
                yield f"{path.stem}_train", case, arrays, True


def _named(outputs):
    return outputs if isinstance(outputs, dict) else {"y": outputs}


class WithLosses:
    """A model whose outputs have the losses that it adds, times a factor."""

    def __init__(self, model, training, factor=1.0):
        self.model = model
        self.training = training
        self.factor = factor
        self.trainable_variables = model.trainable_variables
        self.non_trainable_variables = model.non_trainable_variables

    def __call__(self, inputs):
        outputs = self.model(inputs, training=self.training)
        return {**_named(outputs), **self.named(self.model.losses)}

    def stateless_call(self, *args):
        outputs, state, losses = self.model.stateless_call(
            *args, training=self.training, return_losses=True
        )
        return {**_named(outputs), **self.named(losses)}, state

    def named(self, losses):
        if not losses:
            return {}
        found = {f"auxiliary_loss/{i}": v for i, v in enumerate(losses)}
        return {**found, "auxiliary_loss": self.factor * sum(losses)}


def draws(arrays, training):
    """The recorded draws that decide which labels are dropped."""
    found = [arrays["train/label_draws"]] if training else []
    return recorded_draws(uniform=found)


def outputs_and_gradients(model, recorded, arrays, training, factor=1.0):
    """All that was recorded, by its name."""
    cotangents = {"y": dit_moe.images_last(arrays["cotangent"])}
    if training:
        cotangents["auxiliary_loss"] = np.ones((), "float32")
    with draws(arrays, training):
        outputs, d_inputs, d_weights = run(
            WithLosses(model, training, factor),
            dit_moe.inputs_of(arrays),
            cotangents,
        )
    gradients = recorded.gradients(d_weights)
    return {
        **outputs,
        **{f"grad/w/{name}": value for name, value in gradients.items()},
        "grad/x": d_inputs["images"],
    }


class DiffusionCase(TestCase):
    def assert_recorded(self, found, arrays, training, at_least=5):
        """Compares everything found that was recorded."""
        compared = 0
        for name, value in arrays.items():
            if name.startswith("train/") != training:
                continue
            name = name.removeprefix("train/")
            if name in found:
                with self.subTest(name):
                    if "grad/w/" not in name:
                        value = dit_moe.images_last(value)
                    self.assertEqual(found[name].shape, value.shape)
                    scale = np.abs(value).max()
                    error = np.abs(found[name] - value).max()
                    self.assertLessEqual(error, 1e-5 * scale)
                compared += 1
        self.assertGreaterEqual(compared, at_least)

    def time_features(self, model, arrays):
        """What the first layer of the time steps reads."""
        layer, read = model.get_layer("condition").dense_1, []
        call = layer.call

        def spy(inputs, *args, **kwargs):
            read.append(ops.convert_to_numpy(inputs))
            return call(inputs, *args, **kwargs)

        with mock.patch.object(layer, "call", spy):
            model(dit_moe.inputs_of(arrays))
        return read[0]


class DiTMoECasesTest(DiffusionCase):
    def test_number_of_cases(self):
        self.assertGreaterEqual(len(list(named(dit_moe.matches))), 2)

    @parameterized.named_parameters(named(dit_moe.matches))
    def test_case(self, case, arrays, training):
        model, recorded = dit_moe.model_from_case(case, arrays)
        found = outputs_and_gradients(model, recorded, arrays, training)
        found["time_features"] = self.time_features(model, arrays)
        routings = []
        watched = MoE._routed

        def spy(layer, tokens, routing, *args):
            routings.append((routing, layer.num_experts))
            return watched(layer, tokens, routing, *args)

        with (
            mock.patch.object(MoE, "_routed", spy),
            draws(arrays, training),
        ):
            model(dit_moe.inputs_of(arrays), training=training)
        for number, (routing, experts) in enumerate(routings):
            route = f"route/{number}"
            found[f"{route}/logits"] = ops.convert_to_numpy(routing.logits)
            found[f"{route}/combine"] = dense_weights(routing, experts)
        self.assert_recorded(found, arrays, training)
        if "guided/y" in arrays and not training:
            self.assert_guided(case, arrays, model)

    def assert_guided(self, case, arrays, model):
        number = len(arrays["guided/y"]) // 2
        inputs = dit_moe.inputs_of(arrays)
        outputs = ops.convert_to_numpy(
            model(
                {
                    "images": np.tile(inputs["images"][:number], (2, 1, 1, 1)),
                    "timesteps": np.tile(inputs["timesteps"][:number], 2),
                    "labels": arrays["guided/labels"].astype("int32"),
                }
            )
        )
        wanted = dit_moe.images_last(arrays["guided/y"])
        self.assert_relative(outputs[..., 3:], wanted[..., 3:])
        with_class, without = np.split(outputs[..., :3], 2)
        scale = case["config"]["cfg_scale"]
        guided = without + scale * (with_class - without)
        self.assert_relative(np.tile(guided, (2, 1, 1, 1)), wanted[..., :3])
