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
            name = weight.path.split("table_")[1].split("/")[0]
            tables[name] = rng.normal(size=weight.shape).astype("float32")
            d_tables[name] = np.zeros(weight.shape)
            weight.assign(tables[name])
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
        for path, gradient in gradients.items():
            name = path.split("table_")[1].split("/")[0]
            np.testing.assert_allclose(gradient, d_tables[name], atol=1e-6)
