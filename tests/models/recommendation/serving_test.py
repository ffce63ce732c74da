import os

import keras
import numpy as np

from keras_moe import models
from tests.models.recommendation.small_data import make_data
from tests.models.recommendation.small_data import make_features
from tests.models.recommendation.small_data import scramble
from tests.models.recommendation.small_data import small_tasks
from tests.test_case import TestCase


def served_by_tensorflow(test, model):
    """What serves the model, exported to a SavedModel."""
    try:
        import tensorflow as tf
    except ImportError:
        test.skipTest("a SavedModel needs TensorFlow")
    path = os.path.join(test.get_temp_dir(), "model")
    model.export(path, format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(path)
    return lambda x: loaded.serve(x)  # which does not keep its variables alone


def served_by_torch(test, model):
    import torch

    path = os.path.join(test.get_temp_dir(), "model.pt2")
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in model.input}
    model.export(
        path, format="torch", verbose=False, dynamic_shapes=[(shapes,)]
    )
    program = torch.export.load(path).module()
    return lambda x: program({k: torch.from_numpy(v) for k, v in x.items()})


class ServingTest(TestCase):
    def test_exported_models_predict_the_same(self):
        x, _ = make_data()
        serve = served_by_tensorflow
        if keras.config.backend() == "torch":
            serve = served_by_torch
        for model in (
            models.MMoE(small_tasks(), make_features(), 3, (4,)),
            models.PLE(small_tasks(), make_features(), expert_units=(4,)),
        ):
            scramble(model)
            served = serve(self, model)
            for size in (24, 1):
                part = {name: values[:size] for name, values in x.items()}
                expected = model.predict(part, verbose=0)
                found = served(part)
                self.assertEqual(set(found), set(expected))
                for task, p in found.items():
                    np.testing.assert_allclose(
                        keras.ops.convert_to_numpy(p), expected[task], atol=1e-5
                    )
