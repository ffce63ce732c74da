"""Features and tasks with a dot in their names, as `json_normalize` makes."""

import os

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import layers
from keras_moe import models
from tests.test_case import TestCase

DATA = {"user.age": [31.0, 40.0, 25.0], "user.city": ["Rome", "Oslo", "Rome"]}


class DotsInNamesTest(TestCase):
    @parameterized.parameters("MMoE", "STEM")
    def test_train_save_and_load(self, name):
        features = layers.FeatureEmbedding.from_data(DATA, embedding_dim=2)
        tasks = [models.TaskSpec("a.b", tower_units=(2,)), "a_b"]
        kwargs = {"num_experts": 2} if name == "MMoE" else {}
        model = getattr(models, name)(
            tasks, features, expert_units=(3,), **kwargs
        )
        inputs = features.encode(DATA)
        labels = {"a.b": np.array([0.0, 1.0, 1.0]), "a_b": np.ones(3)}
        model.compile("adam", task_weighting="gradnorm")
        logs = model.fit(inputs, labels, verbose=0).history
        self.assertIn("a.b_loss", logs)
        self.assertTrue(np.isfinite(logs["a.b_loss"]).all())
        # A tower is a task's own, whatever its name.
        towers = {id(v) for v in model.get_layer("a-dot-b_tower_0").variables}
        self.assertTrue(towers.isdisjoint(model._shared_ids))
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        found = loaded.predict(inputs, verbose=0)
        for task, wanted in model.predict(inputs, verbose=0).items():
            self.assert_relative(found[task], wanted)
