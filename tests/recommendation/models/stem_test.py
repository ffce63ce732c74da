"""STEM: an embedding for each task, and whom its gradients reach."""

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import layers
from keras_moe import models
from tests.recommendation.models.model_checks import assert_predicts
from tests.recommendation.models.model_checks import check_trains_and_saves
from tests.recommendation.models.model_checks import specs
from tests.recommendation.models.numpy_trunks import experts
from tests.recommendation.models.numpy_trunks import gates
from tests.recommendation.models.numpy_trunks import mix
from tests.recommendation.models.numpy_trunks import predictions
from tests.recommendation.models.numpy_trunks import randomize
from tests.recommendation.models.numpy_trunks import weights_of
from tests.test_case import TestCase

CITIES = ["Rome", "Oslo", None, "Paris"]
AGES = np.array([1.0, -1.0, 0.5, 2.0], "float32")
# Rows of the tables: missing, unknown, and then the vocabulary.
ROWS = [2, 3, 0, 1]
NAMES = ("features_a", "features_b", "features")


def embedding(**kwargs):
    features = [
        layers.Categorical("city", ["Rome", "Oslo"]),
        layers.Numeric("age", normalize=None),
    ]
    return layers.FeatureEmbedding(features, embedding_dim=3, **kwargs)


def inputs(model):
    columns = {"city": CITIES, "age": AGES}
    return model.get_layer("features").encode(columns)


def make(num_levels=1, **kwargs):
    kwargs = {
        "num_task_experts": [1, 2],
        "num_shared_experts": 1,
        "expert_units": (4,),
        **kwargs,
    }
    return models.STEM(
        specs("a", "b"), embedding(), num_levels=num_levels, **kwargs
    )


def by_hand(model, num_levels):
    units = []
    for name in NAMES:
        table = weights_of(model.get_layer(name))["table_city/embeddings"]
        units.append(np.concatenate([table[ROWS], AGES[:, None]], axis=-1))
    for i in range(num_levels):
        w = weights_of(model.get_layer(f"level_{i}"))
        a, b, shared = units
        reads = [a + shared, b + shared, shared]
        reads = reads if i < num_levels - 1 else reads[:2]
        sees = [[0, 1, 2, 3]] * len(reads)
        outputs = experts(w, [a, b, b, shared])
        units = mix(gates(w, reads, sees), outputs, sees)
    return predictions(model, units)


class STEMTest(TestCase):
    @parameterized.parameters(1, 2)
    def test_by_hand(self, num_levels):
        model = make(num_levels)
        level = 4 * (4 * 4 + 4)
        count = 3 * 4 * 3 + num_levels * level + 2 * 4 * (4 + 1) + 2 * (4 + 1)
        count += (num_levels - 1) * 3 * 4 * (4 + 1)
        self.assertEqual(model.count_params(), count)
        randomize(model)
        assert_predicts(model, inputs(model), by_hand(model, num_levels))

    def test_train_and_save(self):
        model = make()
        again = check_trains_and_saves(self, model, inputs(model))
        for name, values in inputs(again).items():
            np.testing.assert_array_equal(values, inputs(model)[name])

    @parameterized.parameters(True, False)
    def test_gradients(self, stop):
        model = make(stop_cross_task_gradients=stop)
        x = inputs(model)
        model.compile(keras.optimizers.SGD(1.0))
        tables = [model.get_layer(name).weights[0] for name in NAMES]
        before = [keras.ops.convert_to_numpy(table) for table in tables]
        missing = np.full(4, np.nan, "float32")
        model.train_on_batch(x, {"a": np.ones(4, "float32"), "b": missing})
        changed = [
            bool(np.any(keras.ops.convert_to_numpy(table) != old))
            for table, old in zip(tables, before, strict=True)
        ]
        self.assertEqual(changed, [True, not stop, True])

    def test_other_embeddings(self):
        seeded = keras.initializers.RandomNormal(seed=3)
        kwargs = {"embeddings_initializer": seeded, "name": "columns"}
        model = models.STEM(
            ["a", "b"], embedding(output="dict", **kwargs), expert_units=(4,)
        )
        tables = [
            keras.ops.convert_to_numpy(model.get_layer(name).weights[0])
            for name in ("columns_a", "columns_b", "columns")
        ]
        self.assertLen(np.unique(np.round(tables, 6), axis=0), 3)
        x = {"x": keras.Input((5,), name="x")}
        plain = Plain(3)
        model = models.STEM(["a"], plain, inputs=x, expert_units=(4,))
        self.assertEqual(model.get_layer("plain_a").units, 3)
        with self.assertRaisesRegex(ValueError, "a layer that it can copy"):
            models.STEM(["a"], lambda inputs: inputs["x"], inputs=x)
        with self.assertRaisesRegex(ValueError, "`visibility`"):
            make(visibility="own")


@keras.saving.register_keras_serializable("keras_moe_tests")
class Plain(keras.layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = keras.layers.Dense(units)

    def build(self, input_shape):
        self.dense.build(input_shape["x"])

    def call(self, inputs):
        return self.dense(inputs["x"])

    def get_config(self):
        return {**super().get_config(), "units": self.units}
