import os

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import layers
from tests.test_case import TestCase

NAN = float("nan")


def to_numpy(x):
    return keras.ops.convert_to_numpy(x)


def one(feature, **kwargs):
    """A layer of one feature, and the table of it."""
    layer = layers.FeatureEmbedding([feature], embedding_dim=3, **kwargs)
    layer.build()
    table = None
    if layer.weights:
        rng = np.random.default_rng(0)
        table = rng.normal(size=layer.weights[0].shape).astype("float32")
        layer.weights[0].assign(table)
    return layer, table


class FeatureEmbeddingTest(TestCase):
    @parameterized.parameters("compiled", "eager")
    def test_categorical(self, mode):
        layer, table = one(layers.Categorical("a", num_ids=4))
        self.assertEqual(table.shape, (6, 3))
        ids = np.array([0, 3, -1, -2, 4, 1000, -7], "int32")
        rows = [2, 5, 0, 1, 1, 1, 1]
        if mode == "compiled":
            inputs = layer.inputs()
            model = keras.Model(inputs, layer(inputs))
            outputs = model.predict({"a": ids}, verbose=0)
        else:
            outputs = to_numpy(layer({"a": ids[:, None]}))
        np.testing.assert_array_equal(outputs, table[rows])

    @parameterized.parameters("mean", "sum", "sqrtn", "max", "last")
    def test_lists(self, combiner):
        for mask_id in (-1, 0):
            layer, table = one(
                layers.Sequence(
                    "a", num_ids=5, combiner=combiner, mask_id=mask_id
                )
            )
            ids = np.array([[3, 4, 4], [2, -1, -1], [1, 9, -1], [-1, -1, -1]])
            if mask_id == 0:
                ids = np.where(ids == -1, 0, ids)
            outputs = to_numpy(layer({"a": ids.astype("int32")}))
            for row, output in zip(
                ([5, 6, 6], [4], [3, 1], []), outputs, strict=True
            ):
                vectors = table[row]
                expected = (
                    {
                        "mean": lambda v: v.mean(axis=0),
                        "sum": lambda v: v.sum(axis=0),
                        "sqrtn": lambda v: v.sum(axis=0) / np.sqrt(len(v)),
                        "max": lambda v: v.max(axis=0),
                        "last": lambda v: v[-1],
                    }[combiner](vectors)
                    if row
                    else np.zeros(3)
                )
                np.testing.assert_allclose(output, expected, atol=1e-6)

    def test_sequence_with_a_layer(self):
        feature = layers.Sequence(
            "a", num_ids=5, length=4, combiner=keras.layers.GRU(2)
        )
        layer = layers.FeatureEmbedding([feature], embedding_dim=3)
        ids = np.array([[1, 2, -1, -1], [3, 4, 4, 0]], "int32")
        outputs = to_numpy(layer({"a": ids}))
        self.assertEqual(outputs.shape, (2, 2))
        self.assertEqual(
            layer.compute_output_shape({"a": (None, 4)}), (None, 2)
        )
        # What stands in the padding changes nothing.
        short = to_numpy(layer({"a": np.array([[1, 2, -1, -1]] * 2, "int32")}))
        np.testing.assert_allclose(short[1], outputs[0], atol=1e-6)
        self.assertLen(layer.trainable_variables, 4)
        inputs = layer.inputs()
        model = keras.Model(inputs, layer(inputs))
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        again = keras.models.load_model(path)
        np.testing.assert_allclose(
            again.predict({"a": ids}, verbose=0), outputs, atol=1e-6
        )

    def test_numeric(self):
        x = np.array([1.0, -3.0, NAN, 1e9], "float32")
        logs = np.sign(x) * np.log1p(np.abs(x))
        for feature, expected in (
            (layers.Numeric("a", None), np.nan_to_num(x)[:, None]),
            (
                layers.Numeric("a", offset=1, scale=2.0),
                np.nan_to_num((x - 1) / 2)[:, None],
            ),
            (
                layers.Numeric("a", None, log=True, missing_indicator=True),
                np.stack([np.nan_to_num(logs), np.isnan(x)], axis=1),
            ),
        ):
            layer, _ = one(feature)
            outputs = to_numpy(layer({"a": x}))
            np.testing.assert_allclose(outputs, expected, rtol=1e-6)

    def test_large_numbers_in_half_precision(self):
        feature = layers.Numeric("a", offset=1e6, scale=1.0)
        layer, _ = one(feature, dtype="mixed_float16")
        outputs = layer({"a": np.array([1e6 + 1, 1e6 - 2], "float32")})
        self.assertEqual(
            keras.backend.standardize_dtype(outputs.dtype), "float16"
        )
        np.testing.assert_allclose(to_numpy(outputs), [[1.0], [-2.0]])

    def test_bucketized(self):
        layer, table = one(layers.Bucketized("a", boundaries=[0.0, 1.5]))
        self.assertEqual(table.shape, (5, 3))
        x = np.array([-1.0, 0.0, 1.4, 1.5, 9.0, NAN], "float32")
        np.testing.assert_array_equal(
            to_numpy(layer({"a": x})), table[[2, 3, 3, 4, 4, 0]]
        )

    def test_embedded(self):
        layer, _ = one(layers.Embedded("a", 2))
        x = np.array([[1.0, 2.0], [NAN, NAN]], "float32")
        np.testing.assert_array_equal(
            to_numpy(layer({"a": x})), np.nan_to_num(x)
        )

    def test_outputs(self):
        features = [
            layers.Categorical("b", num_ids=3, embedding_dim=2),
            layers.Numeric("a", None),
        ]
        inputs = {
            "a": np.ones(4, "float32"),
            "b": np.ones(4, "int32"),
            "unused": np.ones(4),
        }
        concat = layers.FeatureEmbedding(features)
        self.assertEqual(tuple(concat(inputs).shape), (4, 3))
        by_name = layers.FeatureEmbedding(features, output="dict")
        outputs = by_name(inputs)
        self.assertEqual(list(outputs), ["b", "a"])
        self.assertEqual(
            by_name.compute_output_shape({"a": (4,), "b": (4,)}),
            {name: tuple(x.shape) for name, x in outputs.items()},
        )
        with self.assertRaisesRegex(ValueError, "must be of one width"):
            layers.FeatureEmbedding(features, output="stack")(inputs)
        features = [layers.Categorical(n, num_ids=3) for n in "ab"]
        stack = layers.FeatureEmbedding(features, 5, output="stack")
        inputs["a"] = inputs["b"]
        outputs = to_numpy(stack(inputs))
        self.assertEqual(outputs.shape, (4, 2, 5))
        # One initializer, two tables that differ.
        self.assertGreater(np.abs(outputs[:, 0] - outputs[:, 1]).min(), 0)

    def test_shared_table(self):
        layer = layers.FeatureEmbedding(
            [
                layers.Categorical("item", num_ids=4),
                layers.MultiCategorical("seen", num_ids=4, table="item"),
            ],
            3,
        )
        item = np.array([2], "int32")
        outputs = to_numpy(layer({"item": item, "seen": item[:, None]}))
        np.testing.assert_array_equal(outputs[:, :3], outputs[:, 3:])
        self.assertLen(layer.weights, 1)
        self.assertEqual(
            layer.weights[0].path, "features/table_item/embeddings"
        )
        for other in (
            layers.Categorical("other", num_ids=5, table="item"),
            layers.Categorical(
                "other", list("abcd"), table="item", embedding_dim=2
            ),
        ):
            layer = layers.FeatureEmbedding(
                [layers.Categorical("item", num_ids=4), other], 3
            )
            with self.assertRaisesRegex(ValueError, "share the table 'item'"):
                layer.build()
        layer = layers.FeatureEmbedding(
            [
                layers.Categorical("item", vocabulary=["a", "b"]),
                layers.Categorical(
                    "other", vocabulary=["b", "a"], table="item"
                ),
            ]
        )
        with self.assertRaisesRegex(ValueError, "must have one `vocabulary`"):
            layer.build()

    def test_gradients_reach_the_rows_alone(self):
        layer, _ = one(layers.Categorical("a", num_ids=4))
        inputs = layer.inputs()
        x = keras.layers.Dense(1)(layer(inputs))
        model = keras.Model(inputs, x)
        model.compile(keras.optimizers.SGD(1.0), "mse")
        before = to_numpy(layer.weights[0]).copy()
        model.train_on_batch({"a": np.array([1, -1])}, np.ones((2, 1)))
        moved = np.any(to_numpy(layer.weights[0]) != before, axis=1)
        np.testing.assert_array_equal(moved, [1, 0, 0, 1, 0, 0])

    def test_save(self):
        layer = layers.FeatureEmbedding(
            [
                layers.Categorical("city", ["Rome", "Oslo"]),
                layers.MultiCategorical("tags", [1, 2, 3], length=2),
                layers.Numeric("age", offset=1.0, scale=2.0),
                layers.Bucketized("price", [1.0, 2.0]),
                layers.Embedded("image", 2),
            ],
            embedding_dim=4,
            embeddings_regularizer="l2",
        )
        data = {
            "city": ["Oslo", None, "Lima"],
            "tags": [[1], [], [3, 2, 1]],
            "age": [3.0, None, 1.0],
            "price": [0.0, 1.0, None],
            "image": [[1.0, 2.0], None, [0.0, 1.0]],
        }
        encoded = layer.encode(data)
        inputs = layer.inputs()
        model = keras.Model(inputs, layer(inputs))
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        again = keras.models.load_model(path)
        loaded = again.get_layer("features")
        self.assertEqual(loaded.get_config(), layer.get_config())
        for name, values in loaded.encode(data).items():
            np.testing.assert_array_equal(values, encoded[name])
        np.testing.assert_array_equal(
            model.predict(encoded, verbose=0), again.predict(encoded, verbose=0)
        )
        squares = [
            np.sum(loaded.vectors(table) ** 2)
            for table in ("city", "tags", "price")
        ]
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(sum(again.losses)),
            0.01 * sum(squares),
            rtol=1e-5,
        )

    def test_missing_input(self):
        layer = layers.FeatureEmbedding(
            [layers.Numeric("a", None), layers.Numeric("b", None)]
        )
        with self.assertRaisesRegex(ValueError, r"inputs: \['b'\]. Received"):
            layer({"a": np.ones(2)})

    def test_wrong_data(self):
        layer = layers.FeatureEmbedding(
            [
                layers.Categorical("id", num_ids=3),
                layers.MultiCategorical("list", num_ids=3, length=2),
                layers.Numeric("x", None),
                layers.Embedded("v", 2),
            ]
        )
        good = {
            "id": np.array([0, 2, -1, -2]),
            "list": np.zeros((4, 2), int),
            "x": np.array([1.0, NAN, 2.0, 3.0]),
            "v": np.zeros((4, 2)),
        }
        layer.check_data(good)
        layer.check_data({**good, "x": [1, 2]})  # Not looked into.
        for name, values, message in (
            ("id", np.array([0, 3]), "whole numbers from 0 to 2, -1 .missing"),
            ("id", np.array([0, -3]), "whole numbers from 0 to 2"),
            ("id", np.array([0.5]), "whole numbers from 0 to 2"),
            ("id", np.array([NAN]), "whole numbers from 0 to 2"),
            ("id", np.array(["a"]), "must be made of numbers"),
            ("id", np.zeros((2, 3)), "must be of shape"),
            ("list", np.full((2, 2), 3), "whole numbers from 0 to 2"),
            ("list", np.zeros((2, 3)), "must be of shape"),
            ("x", np.array([np.inf]), "must not have infinite"),
            ("v", np.zeros((2, 3)), "must be of shape"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                layer.check_data({**good, name: values})
        with self.assertRaisesRegex(ValueError, "missing from the inputs"):
            layer.check_data({"id": good["id"]})

    @parameterized.named_parameters(
        ("no_features", lambda: layers.FeatureEmbedding([]), "at least one"),
        (
            "twice",
            lambda: layers.FeatureEmbedding([layers.Numeric("a")] * 2),
            "different names",
        ),
        ("none", lambda: layers.FeatureEmbedding(["a"]), "list of features"),
        (
            "output",
            lambda: layers.FeatureEmbedding([layers.Numeric("a")], output="x"),
            "`output` must be",
        ),
        ("name", lambda: layers.Numeric("a/b"), "`name` must be"),
        (
            "both",
            lambda: layers.Categorical("a", ["x"], num_ids=2),
            "Received both",
        ),
        ("ids", lambda: layers.Categorical("a", num_ids=0), "`num_ids`"),
        ("empty", lambda: layers.Categorical("a", []), "must have entries"),
        ("dup", lambda: layers.Categorical("a", ["x", "x"]), "none twice"),
        (
            "dim",
            lambda: layers.Categorical("a", ["x"], embedding_dim=0),
            "`embedding_dim`",
        ),
        (
            "mask",
            lambda: layers.MultiCategorical("a", ["x"], mask_id=0),
            "With `mask_id=0`",
        ),
        (
            "combiner",
            lambda: layers.MultiCategorical("a", ["x"], combiner="last"),
            "`combiner` must be",
        ),
        (
            "layer",
            lambda: layers.Sequence("a", ["x"], combiner=3),
            "`combiner` must be",
        ),
        (
            "boundaries",
            lambda: layers.Bucketized("a", [1.0, 1.0]),
            "must be ascending",
        ),
        ("scale", lambda: layers.Numeric("a", scale=0.0), "`scale` must be"),
        (
            "normalize",
            lambda: layers.Numeric("a", "z"),
            "`normalize` must be",
        ),
        (
            "not_adapted",
            lambda: layers.FeatureEmbedding([layers.Numeric("a")]).inputs(),
            r"Numeric\('a'\) lacks `offset` and `scale`",
        ),
        (
            "not_adapted_ids",
            lambda: layers.FeatureEmbedding([layers.Categorical("a")]).build(),
            "lacks a `vocabulary` or `num_ids`",
        ),
    )
    def test_errors(self, make, message):
        with self.assertRaisesRegex(ValueError, message):
            make()
