"""What of a model is no argument of its class, and saved all the same."""

import os

import keras
import numpy as np

from keras_moe import models
from tests.recommendation.models.small_data import make_data
from tests.recommendation.models.small_data import make_features
from tests.recommendation.models.small_data import small_tasks
from tests.test_case import TestCase


@keras.saving.register_keras_serializable("keras_moe_tests")
def unnamed_heads(features, tasks):
    return {
        task.name: keras.layers.Dense(1, "sigmoid")(features[i])
        for i, task in enumerate(tasks)
    }


class SavingTest(TestCase):
    def setUp(self):
        super().setUp()
        policy = keras.config.dtype_policy()
        self.addCleanup(keras.config.set_dtype_policy, policy)

    def models(self):
        x, y = make_data()
        yield (
            models.MMoE(small_tasks(), make_features(), 3, (4,)),
            ("experts", "click_logits"),
            (x, y),
        )
        ids = np.array([[0, 0, 1, 2], [3, 4, 5, 1]], "int32")
        yield (
            models.SASRecMoE(
                num_items=5, length=4, embedding_dim=4, num_blocks=1
            ),
            ("items", "moe_0"),
            (ids, ids),
        )

    def save_and_load(self, model):
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        return keras.models.load_model(path)

    def test_what_is_frozen(self):
        for model, frozen, data in self.models():
            for name in frozen:
                model.get_layer(name).trainable = False
            # A weight of a layer that is trained otherwise.
            alone = model.trainable_weights[0]
            alone.trainable = False
            trained = [v.path for v in model.trainable_variables]
            self.assertNotIn(alone.path, trained)
            model.compile("adam")
            model.fit(*data, verbose=0)
            again = self.save_and_load(model)
            self.assertEqual(
                [v.path for v in again.trainable_variables], trained
            )
            for name in frozen:
                self.assertFalse(again.get_layer(name).trainable)
            self.assertEqual(
                len(again.optimizer.variables), len(model.optimizer.variables)
            )

    def test_frozen_layers_without_names(self):
        model = models.MMoE(
            small_tasks(), make_features(), 3, (4,), heads=unnamed_heads
        )
        model.trainable = False
        copy = models.MMoE.from_config(model.get_config())
        self.assertEmpty(copy.trainable_variables)
        copy.trainable = True
        model.trainable = True
        model.layers[-1].trainable = False
        again = self.save_and_load(model)
        self.assertEqual(
            [layer.trainable for layer in again.layers],
            [layer.trainable for layer in model.layers],
        )

    def test_dtype_policy(self):
        keras.config.set_dtype_policy("mixed_bfloat16")
        made = list(self.models())
        keras.config.set_dtype_policy("float32")
        for model, _, (x, _) in made:
            again = self.save_and_load(model)
            self.assertEqual(
                [layer.dtype_policy.name for layer in again.layers],
                [layer.dtype_policy.name for layer in model.layers],
            )
            self.assertEqual(keras.config.dtype_policy().name, "float32")
            expected = model.predict(x, verbose=0)
            keras.tree.map_structure(
                np.testing.assert_array_equal,
                again.predict(x, verbose=0),
                expected,
            )
