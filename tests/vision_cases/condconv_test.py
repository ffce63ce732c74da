"""Mixed kernels against what timm computed."""

import json
import pathlib

import numpy as np
from absl.testing import parameterized

from tests.recommendation_cases.cases import run
from tests.test_case import TestCase
from tests.vision_cases import condconv

DATA = pathlib.Path(__file__).parents[1] / "data" / "vision"


def named():
    """`(name, JSON, arrays)` of each case, and of each mode it records."""
    for path in sorted(DATA.glob("*.json")):
        case = json.loads(path.read_text())
        if condconv.matches(case.get("config", {}), {}):
            with np.load(path.with_suffix(".npz")) as arrays:
                arrays = dict(arrays)
            yield path.stem, case, arrays, False
            if "train/y" in arrays:
                yield f"{path.stem}_train", case, arrays, True


class InTraining:
    """A model whose calls are those of training."""

    def __init__(self, model):
        self.model = model
        self.trainable_variables = model.trainable_variables
        self.non_trainable_variables = model.non_trainable_variables

    def __call__(self, inputs):
        return self.model(inputs, training=True)

    def stateless_call(self, *args):
        return self.model.stateless_call(*args, training=True)


class CondConvCasesTest(TestCase):
    def test_number_of_cases(self):
        self.assertGreaterEqual(len(list(named())), 4)

    @parameterized.named_parameters(named())
    def test_case(self, case, arrays, training):
        model, recorded = condconv.model_from_case(case, arrays)
        prefix = "train/" if training else ""
        inputs = {"x": arrays["x"].transpose(0, 2, 3, 1)}
        if "routing" in arrays:
            inputs["routing"] = arrays["routing"]
        cotangent = arrays["cotangent"]
        outputs, d_inputs, d_weights = run(
            InTraining(model) if training else model,
            inputs,
            {"y": images_last(cotangent)},
        )
        found = {prefix + name: value for name, value in outputs.items()}
        for name, value in d_inputs.items():
            found[f"{prefix}grad/{name}"] = value
        for name, value in recorded.gradients(d_weights).items():
            found[f"{prefix}grad/w/{name}"] = value
        compared = 0
        for name, value in arrays.items():
            other = name.startswith("train/") != training
            if other or name in (*inputs, "cotangent") or name[:2] == "w/":
                continue
            with self.subTest(name):
                value = value if "grad/w/" in name else images_last(value)
                self.assertEqual(found[name].shape, value.shape)
                scale = np.abs(value).max()
                error = np.abs(found[name] - value).max()
                self.assertLessEqual(error, 1e-5 * scale)
            compared += 1
        self.assertGreaterEqual(compared, 4)


def images_last(value):
    """Images with channels last; other arrays as they are."""
    return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value
