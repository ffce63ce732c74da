"""What features learn of data, and how they encode it: all in NumPy."""

import datetime
import hashlib
import unittest

import numpy as np
from absl.testing import parameterized

from keras_moe import layers

try:
    import pandas as pd
except ImportError:
    pd = None

NAN = float("nan")
DATA = {
    "user": [7, 3, 7, 7, 5, 3],
    "city": ["Rome", None, "Oslo", "Rome", NAN, "Bonn"],
    "age": [20.0, 30.0, NAN, 40.0, 50.0, 60.0],
    "tags": [["a"], ["b", "a"], [], None, ["c", "a", "a"], ["b"]],
    "vip": [True, False, True, True, True, False],
    "vector": np.arange(12.0).reshape(6, 2),
}


def made(data=DATA, **kwargs):
    return layers.FeatureEmbedding.from_data(
        data, categorical=["user"], embedding_dim=3, **kwargs
    )


class FeatureDataTest(parameterized.TestCase):
    def check(self, layer, encoded):
        by_name = {feature.name: feature for feature in layer.features}
        self.assertEqual(
            {n: type(f).__name__ for n, f in by_name.items()},
            {
                "user": "Categorical",
                "city": "Categorical",
                "age": "Numeric",
                "tags": "MultiCategorical",
                "vip": "Categorical",
                "vector": "Embedded",
            },
        )
        # The most frequent first, ties by name.
        self.assertEqual(by_name["user"].vocabulary, [7, 3, 5])
        self.assertEqual(by_name["city"].vocabulary, ["Rome", "Bonn", "Oslo"])
        self.assertEqual(by_name["tags"].vocabulary, ["a", "b", "c"])
        self.assertEqual(by_name["tags"].length, 3)
        self.assertEqual(by_name["age"].offset, 40.0)
        np.testing.assert_allclose(by_name["age"].scale, np.sqrt(200))
        expected = {
            "user": [0, 1, 0, 0, 2, 1],
            "city": [0, -1, 2, 0, -1, 1],
            "age": [20, 30, NAN, 40, 50, 60],
            "tags": [
                [0, -1, -1],
                [1, 0, -1],
                [-1, -1, -1],
                [-1, -1, -1],
                [2, 0, 0],
                [1, -1, -1],
            ],
            "vip": [0, 1, 0, 0, 0, 1],
            "vector": np.arange(12.0).reshape(6, 2),
        }
        self.assertEqual(list(encoded), list(expected))
        for name, values in expected.items():
            np.testing.assert_array_equal(encoded[name], values, name)
            dtype = "float32" if name in ("age", "vector") else "int32"
            self.assertEqual(encoded[name].dtype, dtype)
        layer.check_data(encoded)

    def test_dict(self):
        layer = made()
        self.check(layer, layer.encode(DATA))

    @unittest.skipIf(pd is None, "needs pandas")
    def test_frame(self):
        frame = pd.DataFrame({**DATA, "vector": [None] * 6})
        frame["vector"] = list(DATA["vector"])
        layer = layers.FeatureEmbedding(
            [*made().features[:-1], layers.Embedded("vector")], 3
        )
        layer.adapt(frame)
        self.check(layer, layer.encode(frame))
        for dtype in ("category", "string", object):
            other = frame.assign(city=frame["city"].astype(dtype))
            layer = made(other, exclude=["vector"])
            np.testing.assert_array_equal(
                layer.encode(other)["city"], [0, -1, 2, 0, -1, 1]
            )
        nullable = pd.DataFrame(
            {
                "n": pd.array([1, None, 3], dtype="Int64"),
                "b": pd.array([True, None, False], dtype="boolean"),
            },
            index=[5, 6, 9],  # Not that of the rows.
        )
        layer = layers.FeatureEmbedding.from_data(nullable)
        encoded = layer.encode(nullable)
        np.testing.assert_array_equal(encoded["n"], [1, NAN, 3])
        self.assertEqual(layer.features[1].vocabulary, [False, True])
        np.testing.assert_array_equal(encoded["b"], [1, -1, 0])

    def test_stream(self):
        def batches(with_label):
            for i in (0, 2, 3):
                stop = {0: 2, 2: 3, 3: 6}[i]
                table = {name: v[i:stop] for name, v in DATA.items()}
                yield (table, np.zeros(stop - i)) if with_label else table

        for with_label in (True, False):
            layer = made(batches(with_label))
            self.check(layer, layer.encode(DATA))

    def test_tf_data(self):
        try:
            import tensorflow as tf
        except ImportError:
            self.skipTest("needs TensorFlow")
        data = {
            "city": ["Rome", "Oslo", "Rome"],
            "age": [1.0, 2.0, 3.0],
            "list": [[1, 2], [1, 0], [3, 1]],
        }
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(2)
        layer = layers.FeatureEmbedding.from_data(dataset)
        encoded = layer.encode(next(iter(dataset)))
        np.testing.assert_array_equal(encoded["city"], [0, 1])
        self.assertEqual(layer.features[0].vocabulary, ["Rome", "Oslo"])
        np.testing.assert_array_equal(encoded["list"], [[0, 2], [0, 1]])

    def test_unknown_and_rare_values(self):
        data = {"a": list("xxxxyyyzzw")}
        layer = layers.FeatureEmbedding.from_data(data, min_count=2)
        self.assertEqual(layer.features[0].vocabulary, ["x", "y", "z"])
        layer = layers.FeatureEmbedding.from_data(data, max_vocabulary=2)
        self.assertEqual(layer.features[0].vocabulary, ["x", "y"])
        new = {"a": ["w", "z", "y", "new", None]}
        np.testing.assert_array_equal(
            layer.encode(new)["a"], [-2, -2, 1, -2, -1]
        )
        with self.assertRaisesRegex(ValueError, "occurs at least 5 times"):
            layers.FeatureEmbedding.from_data(data, min_count=5)

    def test_ids_in_the_data(self):
        layer = layers.FeatureEmbedding(
            [
                layers.Categorical("a", num_ids=4),
                layers.Sequence("b", num_ids=4, length=2),
                layers.MultiCategorical("c", num_ids=4, length=2, mask_id=0),
            ]
        )
        data = {
            "a": [3.0, NAN, 0.0],
            "b": [[1, 2, 3], [2], []],
            "c": [[1, 2, 3], [2], []],
        }
        encoded = layer.encode(data)
        np.testing.assert_array_equal(encoded["a"], [3, -1, 0])
        np.testing.assert_array_equal(encoded["b"], [[2, 3], [2, -1], [-1, -1]])
        np.testing.assert_array_equal(encoded["c"], [[1, 2], [2, 0], [0, 0]])
        for name, column, message in (
            ("a", [4, 1, 1], "whole numbers from 0 to 3"),
            ("a", ["x", "y", "z"], "has no vocabulary"),
            ("b", [[4], [1], [1]], "whole numbers from 0 to 3"),
            ("b", ["1", "2", "3"], "strings need a `separator`"),
            ("b", [1, 2, 3], "must be made of lists"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                layer.encode({**data, name: column})

    def test_hashed_ids(self):
        # The first number of SplitMix64 begun at 0, as published.
        n = 2**31 - 1
        feature = layers.Categorical("a", num_hash_buckets=n)
        layer = layers.FeatureEmbedding(
            [feature, layers.Sequence("b", table="a", separator="|", length=3)]
        )
        layer.adapt({"b": ["x"]})  # The sequence hashes as its table does.
        lists = ["Rome|Oslo", None, "Oslo"]

        def ids(values, lists=lists):
            return layer.encode({"a": values, "b": lists})

        zero = 0xE220A8397B1DCDAF % n
        for zeros in ([0, 0, None], [0.0, NAN, None], np.array([0, 0, 0])):
            self.assertEqual(ids(zeros)["a"][0], zero)
        self.assertEqual(ids([None, 0, 0])["a"].tolist(), [-1, zero, zero])
        rome, oslo = (
            int.from_bytes(
                hashlib.blake2b(text, digest_size=8).digest(), "little"
            )
            % n
            for text in (b"Rome", b"Oslo")
        )
        encoded = ids(["Rome", 0, "0"])
        self.assertEqual(encoded["a"][:2].tolist(), [rome, zero])
        self.assertNotEqual(encoded["a"][2], zero)
        np.testing.assert_array_equal(
            encoded["b"], [[rome, oslo, -1], [-1, -1, -1], [oslo, -1, -1]]
        )
        again = layers.Categorical.from_config(feature.get_config())
        self.assertEqual(again.ids_of(np.array(["Rome"])).tolist(), [rome])

    def test_hashing_spreads_values(self):
        feature = layers.Categorical("a", num_hash_buckets=50)
        for values in (np.arange(5000), np.arange(0, 500_000, 100)):
            counts = np.bincount(feature.ids_of(values), minlength=50)
            # 100 each, with a standard deviation of 10.
            self.assertLess(np.abs(counts - 100).max(), 45)
        with self.assertRaisesRegex(ValueError, "neither a `vocabulary` nor"):
            layers.Categorical("a", num_ids=3, num_hash_buckets=3)
        with self.assertRaisesRegex(ValueError, "num_hash_buckets"):
            layers.Categorical("a", num_hash_buckets=0)
        other = layers.Categorical("b", [*"xyz"], table="a")
        feature = layers.Categorical("a", num_hash_buckets=3)
        with self.assertRaisesRegex(ValueError, "the other hashes"):
            layers.FeatureEmbedding([feature, other]).build()

    def test_lists_of_floats_are_vectors(self):
        layer = layers.FeatureEmbedding.from_data(
            {"a": [None, [1.0, 2.0]], "b": [[], ["x"]], "c": [[], [1, 2]]}
        )
        names = [type(feature).__name__ for feature in layer.features]
        self.assertEqual(names, ["Embedded", *["MultiCategorical"] * 2])
        self.assertEqual(layer.features[0].dim, 2)

    def test_strings_of_lists(self):
        feature = layers.MultiCategorical("a", separator="|")
        layer = layers.FeatureEmbedding([feature])
        data = {"a": ["x|y", "", "y", None, "|y|"]}
        layer.adapt(data)
        self.assertEqual(feature.vocabulary, ["y", "x"])
        np.testing.assert_array_equal(
            layer.encode(data)["a"],
            [[1, 0], [-1, -1], [0, -1], [-1, -1], [0, -1]],
        )

    def test_padding_goes_before_entries(self):
        lists = {"a": [[5, 3, 0, 0], [0, 4, 0, 7], [1, 2, 3], [6]]}
        for kind, expected in (
            (layers.Sequence, [[5, 3], [4, 7], [2, 3], [6, 0]]),
            (layers.MultiCategorical, [[5, 3], [4, 7], [1, 2], [6, 0]]),
        ):
            feature = kind("a", num_ids=8, length=2, mask_id=0)
            layer = layers.FeatureEmbedding([feature])
            np.testing.assert_array_equal(layer.encode(lists)["a"], expected)
        feature = layers.Sequence("a", ["x", "y"], length=2)
        layer = layers.FeatureEmbedding([feature])
        np.testing.assert_array_equal(
            layer.encode({"a": [["x", "y", None], [None, "z", "x"]]})["a"],
            [[0, 1], [-2, 0]],
        )

    def test_adapt_needs_what_is_to_be_learned(self):
        layer = layers.FeatureEmbedding(
            [
                layers.MultiCategorical("a", num_ids=5, length=2),
                layers.Categorical("b"),
            ]
        )
        layer.adapt({"b": ["x"]})
        self.assertEqual(layer.features[1].vocabulary, ["x"])

    def test_constant_numbers(self):
        for parts in ([np.full(1000, 0.1)], [np.full(7, 0.7)] * 2):
            layer = layers.FeatureEmbedding([layers.Numeric("a")])
            layer.adapt([{"a": part} for part in parts])
            self.assertEqual(layer.features[0].scale, 1.0)

    @unittest.skipIf(pd is None, "needs pandas")
    def test_large_ids_that_may_be_missing(self):
        ids = [2**60 + 1, 2**60 + 2, 2**60 + 3]
        column = pd.array([*ids, None], dtype="Int64")
        frame = pd.DataFrame({"u": column})
        learned = layers.FeatureEmbedding([layers.Categorical("u", ids)])
        hashed = layers.FeatureEmbedding(
            [layers.Categorical("u", num_hash_buckets=10**6)]
        )
        some = hashed.encode(frame[:3])["u"]
        self.assertLen(set(some.tolist()), 3)
        for data in (
            frame,
            frame.astype("category"),
            {"u": [*ids, None]},
            {"u": [*ids, NAN]},
        ):
            np.testing.assert_array_equal(
                learned.encode(data)["u"], [0, 1, 2, -1]
            )
            np.testing.assert_array_equal(hashed.encode(data)["u"], [*some, -1])

    @unittest.skipIf(pd is None, "needs pandas")
    def test_values_that_cannot_be_saved(self):
        for data in (
            {"a": [datetime.date(2020, 1, 1)] * 2},
            pd.DataFrame({"a": pd.cut([1, 2, 3], 2)}),
        ):
            with self.assertRaisesRegex(ValueError, "feature 'a' must be str"):
                layers.FeatureEmbedding.from_data(data, categorical=["a"])

    def test_numbers_that_float32_cannot_tell_apart(self):
        seconds = {"a": 1.7e9 + np.arange(3600)}
        with self.assertWarnsRegex(UserWarning, "'a' has numbers of up to 1.7"):
            layers.FeatureEmbedding.from_data(seconds)
        layers.FeatureEmbedding.from_data({"a": seconds["a"] - 1.7e9})
        layers.FeatureEmbedding.from_data({"a": np.full(3, 1.7e9)})
        feature = layers.Numeric("a")
        for values, message in (
            ([1.0, 1e39], "beyond float32"),
            (np.array([1j]), "real numbers"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                layers.FeatureEmbedding([feature]).adapt({"a": values})

    def test_what_is_no_sequence(self):
        for make, name in (
            (lambda: layers.Bucketized("a", boundaries=3), "boundaries"),
            (lambda: layers.Categorical("a", vocabulary="abc"), "vocabulary"),
            (
                lambda: layers.FeatureEmbedding(layers.Numeric("a")),
                "features",
            ),
        ):
            with self.assertRaisesRegex(ValueError, f"`{name}` must be a"):
                make()

    def test_shared_vocabulary(self):
        features = [
            layers.Categorical("item"),
            layers.Sequence("history", table="item"),
        ]
        layer = layers.FeatureEmbedding(features)
        data = {"item": ["a", "b"], "history": [["c", "b"], ["c", "c"]]}
        layer.adapt(data)
        for feature in features:
            self.assertEqual(feature.vocabulary, ["c", "b", "a"])
        layer.build()
        # What was given to one holds for the other.
        features = [
            layers.Categorical("item", vocabulary=["a", "b"]),
            layers.Sequence("history", table="item", length=2),
        ]
        layer = layers.FeatureEmbedding(features)
        layer.adapt(data)
        self.assertEqual(features[1].vocabulary, ["a", "b"])
        np.testing.assert_array_equal(
            layer.encode(data)["history"], [[-2, 1], [-2, -2]]
        )

    def test_numbers(self):
        x = np.random.default_rng(0).normal(1e6, 2.0, 1000)
        parts = [{"a": x[:1]}, {"a": x[1:300]}, {"a": x[300:]}]
        feature = layers.Numeric("a")
        layers.FeatureEmbedding([feature]).adapt(parts)
        np.testing.assert_allclose(feature.offset, x.mean())
        np.testing.assert_allclose(feature.scale, x.std(), rtol=1e-9)
        feature = layers.Numeric("a", "minmax", log=True)
        layers.FeatureEmbedding([feature]).adapt(parts)
        logs = np.log1p(x)
        np.testing.assert_allclose(feature.offset, logs.min())
        np.testing.assert_allclose(feature.scale, np.ptp(logs))
        feature = layers.Numeric("a")
        layers.FeatureEmbedding([feature]).adapt({"a": [3, 3, None]})
        self.assertEqual((feature.offset, feature.scale), (3.0, 1.0))
        feature = layers.Numeric("a", offset=5.0)
        layers.FeatureEmbedding([feature]).adapt(parts)
        self.assertEqual(feature.offset, 5.0)

    def test_buckets(self):
        x = np.random.default_rng(0).normal(size=5000)
        feature = layers.Bucketized("a", num_buckets=4)
        layers.FeatureEmbedding([feature]).adapt([{"a": x[:99]}, {"a": x[99:]}])
        np.testing.assert_allclose(
            feature.boundaries, np.quantile(x, [0.25, 0.5, 0.75]), rtol=1e-6
        )
        feature = layers.Bucketized("a")
        layers.FeatureEmbedding([feature]).adapt({"a": [0] * 90 + [1] * 10})
        self.assertEqual(feature.num_ids, 3)  # Quantiles of 0 and 0.1.
        x = np.random.default_rng(0).normal(size=300_000)
        feature = layers.Bucketized("a", num_buckets=4)
        layers.FeatureEmbedding([feature]).adapt(
            {"a": part} for part in np.split(x, 10)
        )
        np.testing.assert_allclose(
            feature.boundaries, np.quantile(x, [0.25, 0.5, 0.75]), atol=0.02
        )

    def test_errors(self):
        for kwargs, message in (
            ({"categorical": ["b"]}, "must hold names of columns"),
            (
                {"categorical": ["a"], "exclude": ["a"]},
                "must hold names of columns",
            ),
        ):
            with self.assertRaisesRegex(ValueError, message):
                layers.FeatureEmbedding.from_data({"a": ["x"]}, **kwargs)
        with self.assertRaisesRegex(ValueError, "cannot be told from"):
            layers.FeatureEmbedding.from_data({"a": [None, None]})
        day = np.array(["2020-01-01"], "datetime64[D]")
        for kwargs in ({}, {"categorical": ["a"]}, {"numeric": ["a"]}):
            with self.assertRaisesRegex(ValueError, "holds dates or times"):
                layers.FeatureEmbedding.from_data({"a": day}, **kwargs)
        with self.assertRaisesRegex(ValueError, "must be an array or a list"):
            layers.FeatureEmbedding.from_data({"a": 1.0})
        for feature in (
            layers.Numeric("a"),
            layers.Bucketized("a"),
            layers.Embedded("a"),
        ):
            with self.assertRaisesRegex(ValueError, "are missing"):
                layers.FeatureEmbedding([feature]).adapt({"a": [None, NAN]})
        layer = layers.FeatureEmbedding([layers.Numeric("a")])
        with self.assertRaisesRegex(ValueError, "must be made of numbers"):
            layer.adapt({"a": ["x"]})
        layer_of_vectors = layers.FeatureEmbedding([layers.Embedded("a", 2)])
        for vectors, message in (
            ([None, [1.0, "x"]], "Feature 'a' must be made of numbers"),
            ([[1.0, 2.0], [1.0]], "'a' must be of length 2"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                layer_of_vectors.encode({"a": vectors})
        with self.assertRaisesRegex(ValueError, "infinite"):
            layer.adapt({"a": [np.inf]})
        with self.assertRaisesRegex(ValueError, "No column 'a' in the data"):
            layer.adapt({"b": [1.0]})
        with self.assertRaisesRegex(ValueError, "must be a pandas frame"):
            layer.adapt([3])
        with self.assertRaisesRegex(ValueError, "must not be empty"):
            layers.FeatureEmbedding.from_data(iter([]))
        layer.adapt({"a": [1.0, 2.0]})
        with self.assertRaisesRegex(ValueError, "must be a pandas frame or"):
            layer.encode([1.0])
        with self.assertRaisesRegex(ValueError, "No column 'a'"):
            layer.encode({"b": [1.0]})
        layer.build()
        with self.assertRaisesRegex(ValueError, "already built"):
            layer.adapt({"a": [1.0]})
        layer = layers.FeatureEmbedding(
            [
                layers.Categorical("user", [1, 2]),
                layers.MultiCategorical("city", ["Rome", "Oslo"], length=2),
            ]
        )
        good = {"user": [3.0, 4.0], "city": [["Bonn"], []]}
        np.testing.assert_array_equal(layer.encode(good)["user"], [-2, -2])
        for wrong in ({"user": ["1", "2"]}, {"city": [[1], [2]]}):
            with self.assertRaisesRegex(ValueError, "one has strings"):
                layer.encode({**good, **wrong})
        with self.assertRaisesRegex(ValueError, "columns of one length"):
            layer.encode({**good, "user": [1]})
