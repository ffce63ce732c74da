"""Tables of keras-rs as the embedding of a model."""

import keras
import numpy as np
import pytest

from keras_moe import models
from tests.recommendation.models.small_data import check_save
from tests.recommendation.models.small_data import small_tasks
from tests.test_case import TestCase

keras_rs = pytest.importorskip("keras_rs")
BATCH, DIM = 8, 4


class DistributedEmbeddingTest(TestCase):
    def test_fit_and_save(self):
        sizes = {"user": 5, "item": 3}
        features = {
            name: keras_rs.layers.FeatureConfig(
                name,
                keras_rs.layers.TableConfig(
                    name=f"{name}_table",
                    vocabulary_size=size,
                    embedding_dim=DIM,
                    placement="default_device",
                ),
                (BATCH,),
                (BATCH, DIM),
            )
            for name, size in sizes.items()
        }
        inputs = {
            name: keras.Input((), BATCH, "int32", name=name) for name in sizes
        }
        model = models.MMoE(
            small_tasks(),
            keras_rs.layers.DistributedEmbedding(features, name="tables"),
            num_experts=2,
            inputs=inputs,
        )
        rng = np.random.default_rng(0)
        x = {
            name: rng.integers(size, size=BATCH).astype("int32")
            for name, size in sizes.items()
        }
        y = {t.name: np.arange(BATCH) % 2.0 for t in model.tasks}
        vectors = {
            name: keras.ops.convert_to_numpy(v)
            for name, v in model.get_layer("tables")(x).items()
        }
        tables = {
            v.path.split("/")[-2]: keras.ops.convert_to_numpy(v)
            for v in model.get_layer("tables").weights
        }
        for name, ids in x.items():
            np.testing.assert_array_equal(
                vectors[name], tables[f"{name}_table"][ids]
            )
        model.compile("sgd")
        before = model.get_layer("tables").get_weights()
        model.fit(x, y, batch_size=BATCH, verbose=0)
        after = model.get_layer("tables").get_weights()
        for one, other in zip(before, after, strict=True):
            self.assertTrue((one != other).any())
        check_save(self, model, x)
