"""The core's parts in a diffusion transformer, against what DiT-MoE did.

Not compared is `as_shipped/grad/x`: in inference the original computes its
routed experts without a gradient. `guided/y` is another call of the same model.
"""

import json
import pathlib

import numpy as np
from absl.testing import parameterized
from keras import ops

from tests.recommendation_cases.cases import run
from tests.routing_cases.cases import dense_weights
from tests.test_case import TestCase
from tests.vision_cases import dit_moe

DATA = pathlib.Path(__file__).parents[1] / "data" / "vision"


def named():
    for path in sorted(DATA.glob("*.json")):
        case = json.loads(path.read_text())
        if dit_moe.matches(case):
            with np.load(path.with_suffix(".npz")) as arrays:
                arrays = dict(arrays)
            yield path.stem, case, arrays, False
            if "train/y" in arrays:
                yield f"{path.stem}_train", case, arrays, True


class WithLosses:
    """A model whose outputs have the losses that it adds."""

    def __init__(self, model, training):
        self.model = model
        self.training = training
        self.trainable_variables = model.trainable_variables
        self.non_trainable_variables = model.non_trainable_variables

    def __call__(self, inputs):
        outputs = self.model(inputs, training=self.training)
        return {**outputs, **self.named(self.model.losses)}

    def stateless_call(self, *args):
        outputs, state, losses = self.model.stateless_call(
            *args, training=self.training, return_losses=True
        )
        return {**outputs, **self.named(losses)}, state

    def named(self, losses):
        if not losses:
            return {}
        found = {f"auxiliary_loss/{i}": v for i, v in enumerate(losses)}
        return {**found, "auxiliary_loss": sum(losses)}


class DiTMoECasesTest(TestCase):
    def test_number_of_cases(self):
        self.assertGreaterEqual(len(list(named())), 2)

    @parameterized.named_parameters(named())
    def test_case(self, case, arrays, training):
        model, recorded, layers = dit_moe.model_from_case(case, arrays)
        config = case["config"]
        labels = arrays["labels"]
        if training:  # some are dropped
            draws = arrays["train/label_draws"]
            dropped = draws < config["class_dropout_prob"]
            labels = np.where(dropped, config["num_classes"], labels)
        cotangents = {"y": images_last(arrays["cotangent"])}
        if training:
            cotangents["auxiliary_loss"] = np.ones((), "float32")
        outputs, d_inputs, d_weights = run(
            WithLosses(model, training),
            {
                "x": images_last(arrays["x"]),
                "t": arrays["t"],
                "labels": labels.astype("int32"),
            },
            cotangents,
        )
        found = {
            f"grad/w/{k}": v for k, v in recorded.gradients(d_weights).items()
        }
        found.update(outputs)
        found["grad/x"] = d_inputs["x"]
        for number, layer in enumerate(layers):
            routing = layer.route(outputs[f"in/{number}"])
            route = f"route/{number}"
            found[f"{route}/logits"] = ops.convert_to_numpy(routing.logits)
            found[f"{route}/combine"] = dense_weights(
                routing, layer.num_experts
            )
        compared = 0
        for name, value in arrays.items():
            if name.startswith("train/") != training:
                continue
            name = name.removeprefix("train/")
            if name in found:
                with self.subTest(name):
                    if "grad/w/" not in name:
                        value = images_last(value)
                    self.assertEqual(found[name].shape, value.shape)
                    scale = np.abs(value).max()
                    error = np.abs(found[name] - value).max()
                    self.assertLessEqual(error, 1e-5 * scale)
                compared += 1
        self.assertGreaterEqual(compared, 5)


def images_last(value):
    """Images with channels last; other arrays as they are."""
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
