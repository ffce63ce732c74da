"""Values of the wrong kind, given to features, tasks, weightings and metrics.

Every public class of these folders is tried, with every argument of its
signature.
"""

import inspect
import re

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import callbacks
from keras_moe import layers
from keras_moe import metrics
from keras_moe import models
from keras_moe.recommendation.features.feature_embedding import FeatureEmbedding
from keras_moe.recommendation.tasks.assemble import assemble
from keras_moe.recommendation.tasks.task_spec import in_a_chain
from keras_moe.recommendation.tasks.task_spec import without_towers
from tests.test_case import TestCase

FOLDERS = re.compile(r"keras_moe\.recommendation\.(features|tasks|metrics)\.")
NAN = np.nan
WRONG = {
    "number": (True, NAN, np.inf, "1"),
    "bool": (300, NAN, "no"),
    "choice": ("unheard of", 300, True, NAN),
    "text": (300, True, NAN, ["a"]),
    "list": (300, True, NAN, "12"),
    "tasks": (300, True, NAN, {"a"}),
    "graph": (300, True, NAN, "12", {"x": 1}),
    "layer": (300, True, NAN, "unheard of", keras.layers.Dense),
}
KINDS = {
    # Their defaults do not tell, or there is none.
    **dict.fromkeys(
        (
            *("num_ids", "embedding_dim", "length", "max_vocabulary", "dim"),
            *("num_hash_buckets", "offset", "scale", "num_classes", "seed"),
            *("missing_value", "update_steps", "tower_units"),
        ),
        "number",
    ),
    **dict.fromkeys(("name", "table", "separator", "sample_space"), "text"),
    **dict.fromkeys(
        (
            *("vocabulary", "boundaries", "features", "class_weights"),
            *("weights", "y", "groups"),
        ),
        "list",
    ),
    **dict.fromkeys(("inputs", "outputs"), "graph"),
    "tasks": "tasks",
    "transfer": "layer",
    "metric": "layer",
    "type": "choice",
    "weighting": "choice",
    "normalize": "choice",
}
CHOICES = re.compile("initializer$|regularizer$|activation$")
ONE = np.zeros(1)
NEEDED = {
    "name": "a",
    "features": [layers.Categorical("city", num_ids=2)],
    "weights": ["val_a"],
    "x": {"city": ONE},
    "y": {"a": ONE},
    "groups": ONE,
    "metric": "mse",
    "tasks": ["a"],
}


def classes():
    for module in (callbacks, layers, metrics, models):
        for value in vars(module).values():
            if inspect.isclass(value) and FOLDERS.match(value.__module__):
                yield value


def parameters(make):
    found = inspect.signature(make).parameters.items()
    # Keras checks dtypes, and `predict` what a model takes.
    return [
        (name, parameter)
        for name, parameter in found
        if name not in ("kwargs", "dtype", "x")
    ]


def kind_of(name, default):
    if CHOICES.search(name):
        return "choice"
    if name in KINDS:
        return KINDS[name]
    if isinstance(default, bool):
        return "bool"
    if isinstance(default, str):
        return "choice"
    if isinstance(default, (int, float)):
        return "number"
    raise ValueError(f"KINDS does not say what {name}={default!r} takes.")


def cases():
    for make in classes():
        for name, parameter in parameters(make):
            kind = kind_of(name, parameter.default)
            yield f"{make.__name__}_{name}", make, name, kind


def needed(make):
    arguments = {
        name: NEEDED[name]
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.default is inspect.Parameter.empty and name in NEEDED
    }
    if make is models.MultiTaskModel:
        x = keras.Input((2,), name="x")
        outputs = {"a": keras.layers.Dense(1)(x)}
        arguments.update(inputs={"x": x}, outputs=outputs)
    return arguments


class KindsOfArgumentsTest(TestCase):
    def test_all_are_tried(self):
        tried = set(classes())
        self.assertLessEqual(
            {FeatureEmbedding, models.PCGrad, metrics.Masked}, tried
        )
        self.assertGreaterEqual(len(tried), 25)

    @parameterized.named_parameters(cases())
    def test_wrong_kind(self, make, name, kind):
        arguments = needed(make)
        make(**arguments)
        if name == "num_classes":
            arguments["type"] = "multiclass"
        for value in WRONG[kind]:
            if name == "metric" and value is keras.layers.Dense:
                continue  # Keras takes any function for a metric.
            # Groups are told by their shape: there are many.
            message = f"(?s)`{name}` must .*Received: .*"
            if name != "groups":
                message += re.escape(f"{name}={value!r}")
            with self.assertRaisesRegex(ValueError, message):
                make(**{**arguments, name: value})

    @parameterized.named_parameters(
        ("boundaries", layers.Bucketized, "boundaries", [1.0]),
        ("class_weights", models.TaskSpec, "class_weights", [1.0]),
        ("tower_units", models.TaskSpec, "tower_units", []),
        ("decay", models.StaticWeighting, "decay", [1.0]),
        ("weights", callbacks.CombineLogs, "weights", None),
    )
    def test_wrong_entries(self, make, name, others):
        for value in (True, NAN, np.inf, "2", None):
            given = {"a": value} if others is None else [*others, value]
            with self.assertRaisesRegex(ValueError, f"`{name}` must .*Receiv"):
                make(**{**needed(make), name: given})

    def test_collections_without_an_order(self):
        for make, name, value in (
            # Keras' own form of `class_weight`: its keys are no weights.
            (models.TaskSpec, "class_weights", {0: 1.0, 1: 5.0}),
            (layers.Categorical, "vocabulary", {"b": 1, "a": 0}),
            (layers.Categorical, "vocabulary", {"a", "b"}),
            (layers.Bucketized, "boundaries", {1.0, 2.0}),
        ):
            with self.assertRaisesRegex(ValueError, f"`{name}` must be a seq"):
                make("a", **{name: value})

    def test_what_numpy_has_is_taken(self):
        for boundaries in (np.array([1, 2]), np.array([1, 2], "float32")):
            feature = layers.Bucketized("a", boundaries=boundaries)
            self.assertEqual(feature.boundaries, [1.0, 2.0])
        boundaries = keras.ops.convert_to_tensor([1.0, 2.0])
        if hasattr(boundaries, "tolist"):
            feature = layers.Bucketized("a", boundaries=boundaries)
            self.assertEqual(feature.boundaries, [1.0, 2.0])
        feature = layers.Numeric(
            "a", scale=np.float32(2.0), offset=np.int64(1), log=np.bool_(True)
        )
        self.assertIs(feature.log, True)
        task = models.TaskSpec(
            "a", weight=np.float64(0.5), class_weights=np.array([1, 2])
        )
        self.assertEqual(task.class_weights, (1.0, 2.0))
        gauc = models.GroupAUC(
            {}, {"a": [0, 1]}, ["u", "v"], batch_size=np.int64(4)
        )
        self.assertEqual(gauc.batch_size, 4)
        gauc = models.GroupAUC({}, {"a": ONE}, ONE, batch_size=None)
        self.assertIsNone(gauc.batch_size)
        self.assertEqual(
            layers.Categorical("a", np.array(["b", "c"])).vocabulary, ["b", "c"]
        )

    def test_groups_of_another_number(self):
        with self.assertRaisesRegex(ValueError, "`groups` must be one id an"):
            models.GroupAUC({}, {"a": np.zeros(3)}, np.zeros(2))

    def test_what_compile_gets(self):
        arguments = needed(models.MultiTaskModel)
        model = models.MultiTaskModel(**arguments)
        for value in (300, True, NAN, "unheard of"):
            for name in ("loss", "metrics", "weighted_metrics"):
                with self.assertRaisesRegex(
                    ValueError, f"`{name.removeprefix('weighted_')[:4]}.*Rece"
                ):
                    model.compile(**{name: {"a": value}})
                with self.assertRaisesRegex(ValueError, f"`{name}` must be"):
                    model.compile(**{name: value})
            with self.assertRaisesRegex(ValueError, "`task_weighting` must be"):
                model.compile(task_weighting=value)

    def test_parts_of_models(self):
        good = {
            "tasks": ["a"],
            "embedding": keras.layers.Dense(2),
            "trunk": lambda x: x,
            "inputs": {"x": keras.Input((2,), name="x")},
        }
        for value in (300, True, NAN, "unheard of"):
            for name in ("embedding", "inputs", "heads"):
                with self.assertRaisesRegex(ValueError, f"`{name}` must "):
                    assemble(**{**good, name: value})
        for name, value in (
            ("heads", models.AITMHeads),
            ("embedding", layers.FeatureEmbedding),
        ):
            with self.assertRaisesRegex(ValueError, f"`{name}` must be"):
                assemble(**{**good, name: value})
        for make in (in_a_chain, without_towers):
            for value in (300, True, NAN, [300], {"a", "b"}):
                with self.assertRaisesRegex(ValueError, "`tasks` must be"):
                    make(value)

    def test_from_data(self):
        make = layers.FeatureEmbedding.from_data
        data = {"a": [1.0, 2.0]}
        for name in ("categorical", "exclude"):
            for value in (300, True, NAN):
                with self.assertRaisesRegex(ValueError, f"`{name}` must be"):
                    make(data, **{name: value})
        for name in ("max_vocabulary", "min_count"):
            for value in WRONG["number"]:
                with self.assertRaisesRegex(ValueError, f"`{name}` must be"):
                    make(data, **{name: value})
        for value in (300, True, NAN, "abc", None):
            with self.assertRaisesRegex(ValueError, "`data` must be"):
                make(value)

    def test_group_auc(self):
        good = {"y_true": [0, 1], "y_pred": [0.1, 0.2], "groups": [1, 1]}
        for name in ("y_true", "y_pred"):
            for value in (["a", "b"], "ab", [{}, {}]):
                with self.assertRaisesRegex(ValueError, f"`{name}` must be an"):
                    metrics.group_auc(**{**good, name: value})
