"""Values of the wrong kind, given to the models and to gates."""

import inspect
import re

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import layers
from keras_moe import models
from keras_moe.recommendation.gates.multi_gate_parts import SHORTHANDS
from keras_moe.recommendation.tasks.multi_task_model import MultiTaskModel
from tests.test_case import TestCase

TASKS = ["click", "buy"]
DATA = {"city": ["Rome", "Oslo"], "shop": ["a", "b"], "age": [31.0, 40.0]}
NEEDED = {
    layers.LayerNetworks: {"layer": keras.layers.Dense(3), "num_networks": 2},
    layers.MultiGateMoE: {"num_tasks": 2},
    layers.TaskGates: {},
    models.SASRecMoE: {"num_items": 5, "length": 3, "num_blocks": 1},
    **{
        getattr(models, name): {"tasks": TASKS}
        for name in (
            *("AITM", "AdaTT", "CGC", "DLRMMoE", "ESMM", "HoME", "MMoE"),
            *("OMoE", "PLE", "SNR", "STEM", "SharedBottom"),
        )
    },
    models.M3oE: {"tasks": TASKS, "domain": "city"},
    models.PEPNet: {
        "tasks": TASKS,
        "domain": "city",
        "prior_features": ["shop"],
    },
    models.STAR: {"tasks": TASKS, "domain": "city"},
}
WRONG = {
    "number": (True, np.nan, np.inf, "1", [True]),
    "widths": (True, np.nan, "1", [True], [2.5], [[4], "2"]),
    "bool": (300, np.nan, "no"),
    "choice": ("unheard of", 300, True),
    "names": (True, np.nan, 300, ["unheard of"], [True]),
    "dict": (True, "x", [3], 0),
    "layer": (True, np.nan, "x", [3]),
}
# The kinds of arguments whose default does not tell.
KINDS = {
    "number": "^num_|^length$|rank$|top_k$|routing_units$|gate_units$|^seed$|"
    "intermediate_dim$",
    "widths": "units$",
    "choice": "initializer$|regularizer$|activation$|normalization$|"
    "^self_residual$|^expert_slots$|^visible$",
    "names": "^tasks$|^domain$|features$|^groups$",
    "dict": "^cross_options$|^inputs$",
    "layer": "^embedding$|^layer$|^experts$|^gates$",
}


def kind_of(make, name, default):
    # As a flat argument of MultiGateMoE, it is the widths of layers.
    if make is layers.MultiGateMoE and name == "gate_units":
        return "widths"
    if isinstance(default, bool):
        return "bool"
    for kind, pattern in KINDS.items():
        if re.search(pattern, name):
            return kind
    if isinstance(default, str):
        return "choice"
    if isinstance(default, (int, float)):
        return "number"
    raise ValueError(f"What does {name}={default!r} take?")


def parameters(make):
    found = {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        # Keras checks dtypes.
        if name not in ("kwargs", "dtype")
    }
    if make is layers.MultiGateMoE:
        # All of them have the same default in TaskGates and StackedMLP.
        found.update((name, None) for name in sorted(SHORTHANDS))
        for name in ("expert_use_bias", "gate_use_bias"):
            found[name] = True
        found["expert_normalization_place"] = "before_activation"
        for name in SHORTHANDS:
            if re.search("epsilon|dropout|gamma|weight|temperature", name):
                found[name] = 0.5
    return found


def cases():
    for make in NEEDED:
        yield make.__name__, make


class ModelArgumentsTest(TestCase):
    @parameterized.named_parameters(cases())
    def test_wrong_kind(self, make):
        given = dict(NEEDED[make])
        if issubclass(make, MultiTaskModel):
            given["embedding"] = layers.FeatureEmbedding.from_data(DATA)
        make(**given)
        for name, default in parameters(make).items():
            for value in WRONG[kind_of(make, name, default)]:
                if name == "tasks" and value == ["unheard of"]:
                    continue  # the name of a task
                message = f"(?s)`{name}` must .*Received: .*"
                if name != "tasks":  # only one of them is shown
                    message += re.escape(f"{name}=")
                with (
                    self.subTest(argument=name, value=value),
                    self.assertRaisesRegex(ValueError, message),
                ):
                    make(**{**given, name: value})

    @parameterized.parameters(
        ("PLE", "seed", True),
        ("PLE", "kernel_initializer", "unheard of"),
        ("PLE", "gate_initializer", 300),
        ("PLE", "gate_dropout", np.nan),
        ("HoME", "self_residual", True),
        ("SNR", "seed", True),
        ("SNR", "l0_weight", "1"),
        ("SharedBottom", "dropout", True),
        ("AITM", "stop_gradient", 1),
        ("SASRecMoE", "weights_on", "no"),
    )
    def test_arguments_of_layers(self, model, name, value):
        make = getattr(models, model)
        given = dict(NEEDED[make])
        if "tasks" in given:
            given["embedding"] = layers.FeatureEmbedding.from_data(DATA)
        message = f"`{name}` must .*{re.escape(f'{name}={value!r}')}"
        with self.assertRaisesRegex(ValueError, message):
            make(**given, **{name: value})

    def test_experts_that_are_not_a_layer(self):
        class Networks:
            num_networks = 8

        with self.assertRaisesRegex(ValueError, "`experts` must be a layer"):
            layers.MultiGateMoE(2, experts=Networks())

    def test_none_and_numpy_values(self):
        features = layers.FeatureEmbedding.from_data(DATA)
        m3oe = models.M3oE(
            TASKS,
            features,
            "city",
            normalization=None,
            dropout=np.float32(0.5),
            stop_gate_gradients=np.False_,
            seed=None,
        )
        self.assertEqual(m3oe.get_layer("star_mlp").dropout, 0.5)
        star = models.STAR(
            TASKS,
            features,
            "city",
            normalization=np.False_,
            auxiliary_units=None,
        )
        names = [layer.name for layer in star.layers]
        self.assertNotIn("normalization", names)
        pepnet = models.PEPNet(TASKS, features, None, "shop")
        names = [layer.name for layer in pepnet.layers]
        self.assertNotIn("epnet", names)

    @parameterized.parameters(True, 0.5, np.nan, "last", 1, -2)
    def test_level_of_gate_weights(self, level):
        features = layers.FeatureEmbedding.from_data(DATA)
        model = models.MMoE(TASKS, features)
        with self.assertRaisesRegex(ValueError, "`level` must be .*level="):
            model.gate_weights(features.encode(DATA), level=level)

    def test_exclude_seen(self):
        model = models.SASRecMoE(**NEEDED[models.SASRecMoE])
        message = "`exclude_seen` must be .*exclude_seen='no'"
        with self.assertRaisesRegex(ValueError, message):
            model.recommend(np.ones((1, 3), "int32"), 1, exclude_seen="no")

    def test_all_models_are_tried(self):
        made = {
            model
            for model in vars(models).values()
            if inspect.isclass(model)
            and issubclass(model, keras.Model)
            and model.__module__.startswith("keras_moe.recommendation.")
        }
        self.assertEqual(made - set(NEEDED), {MultiTaskModel})
