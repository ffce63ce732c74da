import itertools

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import layers
from tests.test_case import TestCase


class Columns(keras.layers.Layer):
    """A `FeatureEmbedding` of the columns of one tensor `(B, features)`."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def call(self, x):
        names = [feature.name for feature in self.embedding.features]
        outputs = self.embedding({n: x[:, i] for i, n in enumerate(names)})
        if isinstance(outputs, dict):
            outputs = keras.ops.concatenate(list(outputs.values()), axis=-1)
        return keras.ops.reshape(outputs, (x.shape[0], -1))


class FeatureLookupsTest(TestCase):
    @parameterized.parameters("concat", "dict")
    def test_small_tables_read_as_one(self, output):
        kinds = layers.Categorical
        features = [
            kinds("a", num_ids=3),
            kinds("b", num_ids=5),
            kinds("large", num_ids=2000),
            kinds("c", num_ids=3, table="a"),
            kinds("wide", num_ids=2, embedding_dim=4),
            kinds("wider", num_ids=2, embedding_dim=4),
            layers.Numeric("number", None),
            kinds("d", num_ids=4),
        ]
        embedding = layers.FeatureEmbedding(features, 2, output)
        embedding.build()
        layer = Columns(embedding)
        x = np.array(
            [
                [0, 4, 1999, 2, 1, -1, 0.5, 3],
                [-1, 5, 0, 3, -2, 0, 2.0, 9],
                [2, -1, 7, 0, 0, 1, 1.0, 0],
            ],
            "float32",
        )
        layer(x)
        rng = np.random.default_rng(0)
        tables, expected, d_tables = {}, [], {}
        for weight in embedding.weights:
            weight.assign(rng.normal(size=weight.shape))
        # In the order of their first features, width by width.
        names = [["a", "b", "d"], ["large"], ["wide", "wider"]]
        self.assertEqual(
            [tuple(weight.shape) for weight in embedding.weights],
            [(5 + 7 + 6, 2), (2002, 2), (8, 4)],
        )
        for name in itertools.chain(*names):
            tables[name] = embedding.vectors(name)
            d_tables[name] = np.zeros(tables[name].shape)
        cotangent = rng.normal(size=(3, 19)).astype("float32")
        for feature, values in zip(features, x.T, strict=True):
            start = sum(part.shape[1] for part in expected)
            if feature.name == "number":
                expected.append(values[:, None])
                continue
            known = (values >= 0) & (values < feature.num_ids)
            rows = np.where(known, values + 2, values != -1).astype(int)
            expected.append(tables[feature.table][rows])
            width = expected[-1].shape[1]
            np.add.at(
                d_tables[feature.table],
                rows,
                cotangent[:, start : start + width],
            )
        outputs, _, gradients = self.outputs_and_gradients(layer, x, cotangent)
        np.testing.assert_allclose(outputs, np.concatenate(expected, axis=1))
        for weight, together in zip(embedding.weights, names, strict=True):
            np.testing.assert_allclose(
                gradients[weight.path.split("/", 1)[1]],
                np.concatenate([d_tables[name] for name in together]),
                atol=1e-6,
            )

    def test_which_tables_are_together(self):
        def made(**kwargs):
            layer = layers.FeatureEmbedding(
                [
                    layers.Categorical("a", num_ids=3),
                    layers.MultiCategorical("list", num_ids=2, length=2),
                    layers.Bucketized("number", boundaries=[0.0, 1.0]),
                    layers.Categorical("b", num_ids=3, table="a"),
                    layers.Categorical("c", num_ids=3),
                ],
                **kwargs,
            )
            layer.build()
            return layer

        alone = 4
        l1l2 = keras.regularizers.L1L2(0.1, 0.2)
        ranks = keras.regularizers.OrthogonalRegularizer()
        for number, kwargs in (
            (1, {}),
            (1, {"embeddings_regularizer": l1l2}),
            (1, {"embeddings_initializer": "zeros"}),
            (1, {"embeddings_initializer": "normal"}),
            # Of these one variable would have another scale, or another loss.
            (alone, {"embeddings_initializer": "glorot_uniform"}),
            (alone, {"embeddings_regularizer": ranks}),
        ):
            self.assertLen(made(**kwargs).weights, number, kwargs)
        layer = made()
        # Each vector is drawn of its own, those of tables of one shape too.
        drawn = layer.vectors("a"), layer.vectors("c")
        self.assertEqual(drawn[0].shape, (5, 16))
        self.assertGreater(np.abs(drawn[0] - drawn[1]).min(), 0)
        # So are those of large ones, of a seed or not.
        for seed in (None, 3):
            large = layers.FeatureEmbedding(
                [layers.Categorical(n, num_hash_buckets=2000) for n in "ab"],
                embeddings_initializer=keras.initializers.RandomUniform(
                    seed=seed
                ),
            )
            large.build()
            drawn = large.vectors("a"), large.vectors("b")
            self.assertGreater(np.abs(drawn[0] - drawn[1]).mean(), 0.01)
        with self.assertRaisesRegex(ValueError, "`table` must be the name"):
            layer.vectors("b")
        # A table has the same vectors whoever reads it, at whatever place.
        x = {"a": [0], "b": [2], "c": [-1], "number": [0.5], "list": [[1, -1]]}
        outputs = keras.ops.convert_to_numpy(
            layer({name: np.array(value) for name, value in x.items()})
        )
        places = [
            *(("a", 2), ("list", 3), ("number", 3), ("a", 4), ("c", 0)),
        ]
        expected = [layer.vectors(name)[row] for name, row in places]
        np.testing.assert_allclose(outputs[0], np.concatenate(expected))
