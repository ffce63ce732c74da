import keras
import numpy as np

from keras_moe import callbacks
from keras_moe import metrics
from keras_moe import models
from tests.recommendation.tasks.multi_task_model_test import make_data
from tests.recommendation.tasks.multi_task_model_test import make_model
from tests.test_case import TestCase


class CombineLogsTest(TestCase):
    def test_value(self):
        callback = callbacks.CombineLogs({"a": 2.0, "b": -0.5}, name="both")
        logs = {"a": 0.7, "b": 1.2}
        callback.on_epoch_end(0, logs)
        np.testing.assert_allclose(logs["both"], (1.4 - 0.6) / 2.5)
        callback = callbacks.CombineLogs(["a", "b"])
        callback.on_epoch_end(0, logs)
        np.testing.assert_allclose(logs["val_combined"], 0.95)
        logs["b"] = float("nan")
        callback.on_epoch_end(0, logs)
        self.assertTrue(np.isnan(logs["val_combined"]))

    def test_epochs_without_validation(self):
        callback = callbacks.CombineLogs(["val_a"])
        logs = {"a": 1.0}
        callback.on_epoch_end(0, logs)
        self.assertEqual(logs, {"a": 1.0})

    def test_early_stopping_on_several_tasks(self):
        x, y = make_data()
        model = make_model(["click", models.TaskSpec("watch", "regression")])
        model.compile(keras.optimizers.SGD(0.0))
        gauc = models.GroupAUC(x, {"click": y["click"]}, np.arange(96) % 5)
        history = model.fit(
            x,
            y,
            epochs=9,
            verbose=0,
            validation_data=(x, y),
            callbacks=[
                gauc,
                callbacks.CombineLogs(
                    {"val_click_gauc": 1.0, "val_watch_rmse": -1.0}
                ),
                keras.callbacks.EarlyStopping(
                    "val_combined", mode="max", patience=2
                ),
            ],
        ).history
        # Nothing is learned, so that it stops after the patience.
        self.assertLen(history["loss"], 3)
        expected = metrics.group_auc(
            y["click"],
            model.predict(x, verbose=0)["click"],
            np.arange(96) % 5,
        )
        np.testing.assert_allclose(history["val_click_gauc"][0], expected)
        np.testing.assert_allclose(
            history["val_combined"][0],
            (expected - history["val_watch_rmse"][0]) / 2,
        )

    def test_errors(self):
        for weights in ({}, {"a": 0.0}):
            with self.assertRaisesRegex(ValueError, "must hold a weight"):
                callbacks.CombineLogs(weights)
        with self.assertRaisesRegex(ValueError, "must be a finite number"):
            callbacks.CombineLogs({"a": float("nan")})
        callback = callbacks.CombineLogs(["val_a", "val_b"])
        with self.assertRaisesRegex(ValueError, "No log of the name 'val_b'"):
            callback.on_epoch_end(0, {"val_a": 1.0})
        with self.assertRaisesRegex(ValueError, "No log of the name 'c'"):
            callbacks.CombineLogs(["c"]).on_epoch_end(0, {"a": 1.0})
