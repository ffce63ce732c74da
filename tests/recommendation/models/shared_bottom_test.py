"""The shared bottom."""

import numpy as np

from keras_moe import models
from tests.recommendation.models.model_checks import DIM
from tests.recommendation.models.model_checks import assert_predicts
from tests.recommendation.models.model_checks import batch
from tests.recommendation.models.model_checks import check_trains_and_saves
from tests.recommendation.models.model_checks import specs
from tests.recommendation.models.model_checks import vectors
from tests.recommendation.models.numpy_trunks import network
from tests.recommendation.models.numpy_trunks import predictions
from tests.recommendation.models.numpy_trunks import randomize
from tests.recommendation.models.numpy_trunks import weights_of
from tests.test_case import TestCase


class SharedBottomTest(TestCase):
    def test_by_hand(self):
        model = models.SharedBottom(specs("a", "b"), vectors(), (5, 4))
        count = DIM * 5 + 5 + 5 * 4 + 4 + 2 * (4 + 1)
        self.assertEqual(model.count_params(), count)
        randomize(model)
        x = batch()
        w = weights_of(model.get_layer("bottom"))
        hidden = network(w, 0, x["x"].astype("float64"))
        assert_predicts(model, x, predictions(model, [hidden] * 2))
        with self.assertRaisesRegex(ValueError, "SharedBottom has no gates"):
            model.gate_weights(x)

    def test_options(self):
        tasks = [
            models.TaskSpec("a", tower_units=(4,)),
            models.TaskSpec("b", "multiclass", num_classes=3),
            models.TaskSpec("c", "regression", tower_units=()),
        ]
        model = models.SharedBottom(
            tasks,
            vectors(),
            bottom_units=(5,),
            normalization="batch",
            dropout=0.2,
            activation="gelu",
            name="baseline",
        )
        again = check_trains_and_saves(self, model, batch())
        self.assertEqual(again.name, "baseline")
        p = again.predict_on_batch(batch())["b"]
        np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-5)

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "`bottom_units`|`units`"):
            models.SharedBottom(["a"], vectors(), ())
        with self.assertRaisesRegex(ValueError, r"Received: \['unit'\]"):
            models.SharedBottom(["a"], vectors(), unit=3)
