"""What `fit` takes of data, and what it says of data that is wrong."""

import keras
import numpy as np
from keras import ops

from keras_moe import callbacks
from keras_moe import metrics
from keras_moe import models
from keras_moe.recommendation.tasks import labels
from keras_moe.recommendation.tasks.task_spec import as_tasks
from tests.recommendation.tasks.multi_task_model_test import make_data
from tests.recommendation.tasks.multi_task_model_test import make_model
from tests.test_case import TestCase

NAN = float("nan")


class Frame:
    """What matters here of a pandas frame."""

    def __init__(self, data):
        self.data = data
        self.columns = list(data)

    def __getitem__(self, name):
        return self.data[name]


class MultiTaskDataTest(TestCase):
    def test_impossible_labels_of_a_batch(self):
        # In arrays that `fit` gets they are an error.
        x, y = make_data()
        for task, label in (("click", -1.0), ("stars", 3.0), ("stars", 0.5)):
            model = make_model()
            model.compile("sgd")
            wrong = {**y, task: np.where(np.arange(96) == 5, label, y[task])}
            with self.assertRaisesRegex(ValueError, f"task '{task}' must be"):
                model.fit(x, wrong, verbose=0)
            try:
                logs = model.train_on_batch(x, wrong, return_dict=True)
            except Exception as error:  # of PyTorch's or TensorFlow's own loss
                self.assertRegex(str(error), "0 and 1|out of bounds|range")
            else:
                self.assertTrue(np.isnan(logs[f"{task}_loss"]))

    def test_kinds_of_labels(self):
        x, y = make_data()
        model = make_model([models.TaskSpec("click"), models.TaskSpec("buy")])
        model.compile("sgd")
        y = {"click": y["click"], "buy": y["buy"]}
        expected = model.evaluate(x, y, verbose=0)
        pandas = Frame({**y, "other": y["click"] * 9})
        for given in (pandas, {name: v.tolist() for name, v in y.items()}):
            np.testing.assert_allclose(
                model.evaluate(x, given, verbose=0), expected, rtol=1e-5
            )
        for run in (model.fit, model.evaluate, model.predict):
            with self.assertRaisesRegex(ValueError, "`x` must be a dict of"):
                run(Frame(x))

    def test_data_of_other_kinds(self):
        x, y = make_data()
        batches = [
            (
                {k: v[i : i + 32] for k, v in x.items()},
                {k: v[i : i + 32] for k, v in y.items()},
            )
            for i in range(0, 96, 32)
        ]

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return 3

            def __getitem__(self, i):
                return batches[i]

        def generator():
            while True:
                yield from batches

        kinds = {
            "arrays": ((x, y), {"batch_size": 32, "shuffle": False}),
            "generator": ((generator(),), {"steps_per_epoch": 3}),
            "py_dataset": ((Batches(),), {"shuffle": False}),
        }
        try:
            import tensorflow as tf
        except ImportError:
            pass
        else:
            dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(32)
            kinds["tf_data"] = ((dataset,), {})
        losses = {}
        for kind, (data, kwargs) in kinds.items():
            keras.utils.set_random_seed(0)
            model = make_model()
            model.compile("adam", task_weighting="uncertainty")
            history = model.fit(*data, epochs=2, verbose=0, **kwargs).history
            losses[kind] = history["loss"]
        for kind in losses:
            np.testing.assert_allclose(
                losses[kind], losses["arrays"], rtol=1e-4, err_msg=kind
            )

    def test_columns_that_are_not_used_are_no_error(self):
        x, y = make_data()
        model = make_model(["click"])
        model.compile("adam")
        x = {**x, "user": np.arange(96)}
        model.fit(x, y, verbose=0)

    def test_validation_data(self):
        x, y = make_data()
        y = {"click": y["click"], "watch": y["watch"]}
        model = make_model(["click", models.TaskSpec("watch", "regression")])
        model.compile(keras.optimizers.SGD(0.0))
        expected = model.evaluate(x, y, verbose=0, return_dict=True)
        lists = {name: values.tolist() for name, values in y.items()}
        for given in (Frame(y), lists):
            history = model.fit(
                x, y, validation_data=(x, given), verbose=0
            ).history
            for name, value in expected.items():
                np.testing.assert_allclose(
                    history[f"val_{name}"], [value], rtol=1e-4
                )
        before = model.get_weights()
        model.compile(keras.optimizers.SGD(0.1))
        for wrong, message in (
            ((x, {**y, "click": y["click"] * 5}), "must be from 0 to 1"),
            ((Frame(x), y), "`x` must be a dict of"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                model.fit(x, y, validation_data=wrong, verbose=0)
        # Nobody waits for an epoch to hear of it.
        for one, other in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_loss_of_an_evaluation(self):
        x, y = make_data()
        y = {"click": y["click"], "watch": y["watch"].copy()}
        y["watch"][:85] = NAN  # most batches have none
        model = make_model(
            ["click", models.TaskSpec("watch", "regression", weight=0.5)],
            trunk=keras.layers.Dense(
                8, kernel_regularizer=keras.regularizers.L2(0.1)
            ),
        )
        model.compile(keras.optimizers.SGD(0.0))
        p = model.predict(x, verbose=0)
        click = np.where(y["click"] == 1, p["click"][:, 0], 0)
        click = -np.log(np.where(click > 0, click, 1 - p["click"][:, 0]))
        watch = (y["watch"] - p["watch"][:, 0])[85:] ** 2
        expected = click.mean() + 0.5 * watch.mean()
        (added,) = model.losses
        expected += float(ops.convert_to_numpy(added))
        found = [
            model.evaluate(x, y, batch_size=size, verbose=0)[0]
            for size in (7, 32, 96)
        ]
        found.append(model.test_on_batch(x, y)[0])
        history = model.fit(x, y, validation_data=(x, y), verbose=0).history
        found.append(history["val_loss"][0])
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        self.assertNotIn("added_loss", history)
        # No label of a task: no number for it, and no error in an evaluation.
        y["watch"][:] = NAN
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
        self.assertTrue(np.isnan(logs["watch_loss"]))
        np.testing.assert_allclose(
            logs["loss"], expected - 0.5 * watch.mean(), rtol=1e-4
        )

    def test_loss_of_a_model_that_has_diverged(self):
        x, y = make_data()
        tasks = ["click", models.TaskSpec("watch", "regression")]
        model = make_model(tasks)
        model.compile("sgd")
        logits = model.get_layer("watch_logits")
        logits.set_weights([w * NAN for w in logits.get_weights()])
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
        self.assertFalse(np.isnan(logs["click_loss"]))
        self.assertTrue(np.isnan(logs["loss"]))
        # Nor is a model good of which nothing is known.
        model = make_model(tasks)
        model.compile("sgd")
        y = {name: labels * NAN for name, labels in y.items()}
        self.assertTrue(np.isnan(model.test_on_batch(x, y)[0]))

    def test_added_losses(self):
        x, y = make_data()
        # The name is one that the model might want for itself.
        y = {"added": y["click"]}
        for policy in ("float32", "mixed_bfloat16"):
            model = make_model(
                ["added"],
                trunk=keras.layers.Dense(
                    8, activity_regularizer="l2", dtype=policy
                ),
            )
            model.compile("sgd")
            logs = model.fit(x, y, verbose=0).history
            self.assertIn("added_loss", logs)
            logs = model.evaluate(x, y, verbose=0, return_dict=True)
            self.assertGreater(logs["loss"], logs["added_loss"])

    def test_metrics_are_there_once(self):
        x, y = make_data()
        model = make_model(["click", "buy"])
        own = {k: [keras.metrics.BinaryAccuracy()] for k in ("click", "buy")}
        model.compile("sgd", metrics=own)
        losses = {"loss", "click_loss", "buy_loss"}
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
        of_tasks = {"click_binary_accuracy", "buy_binary_accuracy"}
        self.assertEqual(set(logs), losses | of_tasks)
        model.compile("sgd")
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
        self.assertEqual(set(logs), losses | {"click_auc", "buy_auc"})

    def test_weights_of_missing_labels_may_be_nan(self):
        x, y = make_data()
        weight = np.where(np.isnan(y["buy"]), NAN, 0.5).astype("float32")
        steps = []
        for missing in (NAN, 0.0):
            model = make_model(["buy"])
            model.set_weights([np.full(w.shape, 0.1) for w in model.weights])
            model.compile(
                keras.optimizers.SGD(1.0), weighted_metrics={"buy": "auto"}
            )
            given = np.where(np.isnan(weight), missing, weight)
            logs = model.train_on_batch(x, y["buy"], given, return_dict=True)
            steps.append((logs, model.get_weights()))
        (logs, weights), (expected_logs, expected) = steps
        for name, value in expected_logs.items():
            np.testing.assert_allclose(logs[name], value, rtol=1e-5)
        for one, other in zip(weights, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)

    def test_labels_that_are_objects(self):
        x, y = make_data()
        model = make_model(["buy"])
        model.compile("sgd")
        labels = [None if np.isnan(v) else int(v) for v in y["buy"]]
        expected = model.evaluate(x, {"buy": y["buy"]}, verbose=0)
        for given in (labels, np.array(labels, object)):
            found = model.evaluate(x, {"buy": given}, verbose=0)
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        with self.assertRaisesRegex(ValueError, "`TaskSpec.class_weights`"):
            model.fit(x, {"buy": y["buy"]}, class_weight={0: 1.0, 1: 2.0})

    def test_unknown_task_of_sample_weights(self):
        weights = {"clik": np.ones(3)}
        with self.assertRaisesRegex(ValueError, r"Received: \['clik'\]"):
            labels.weights_of(as_tasks(["click", "buy"]), weights)

    def test_entire_space(self):
        # Of who did not click, no purchase is known; none can have happened.
        rng = np.random.default_rng(0)
        x = {"a": np.zeros((4000, 4), "float32")}
        x["b"] = np.zeros(4000, "float32")
        click = (rng.random(4000) < 0.2) * 1.0
        buy = click * (rng.random(4000) < 0.5)
        tasks = [
            models.TaskSpec("click", tower_units=()),
            models.TaskSpec("buy", tower_units=(), sample_space="click"),
        ]
        for outside in (0.0, NAN):
            model = make_model(tasks, heads="esmm")
            model.compile(keras.optimizers.Adam(0.1))
            y = {"click": click, "buy": np.where(click == 1, buy, outside)}
            model.fit(x, y, batch_size=1000, epochs=20, verbose=0)
            p = model.predict_on_batch({k: v[:1] for k, v in x.items()})
            np.testing.assert_allclose(p["click"], click.mean(), atol=0.03)
            np.testing.assert_allclose(p["buy"], buy.mean(), atol=0.03)

    def test_callback_list(self):
        x, y = make_data()
        model = make_model()
        weighting = models.StaticWeighting(decay=0.5)
        model.compile("sgd", task_weighting=weighting)
        listed = keras.callbacks.CallbackList(
            [], add_history=True, model=model, epochs=2, steps=3
        )
        for epochs in (2, 4):
            model.fit(x, y, epochs=2, verbose=0, callbacks=listed)
            # Each epoch ends once.
            np.testing.assert_allclose(
                ops.convert_to_numpy(weighting.task_weights())[0],
                0.5**epochs,
            )

    def test_grouped_auc(self):
        x, y = make_data()
        tasks = [
            models.TaskSpec("click"),
            models.TaskSpec("buy", sample_space="click", missing_value=-1),
        ]
        model = make_model(tasks)
        model.compile(keras.optimizers.SGD(0.0))
        buy = np.where(np.isnan(y["buy"]), -1, y["buy"])
        of_both = {"click": y["click"], "buy": buy}
        groups = np.arange(96) % 5
        logs = model.fit(
            x,
            of_both,
            verbose=0,
            callbacks=[models.GroupAUC(x, of_both, groups)],
        ).history
        inside = (y["click"] == 1) & (buy >= 0)
        expected = metrics.group_auc(
            buy[inside],
            model.predict(x, verbose=0)["buy"][inside],
            groups[inside],
        )
        np.testing.assert_allclose(logs["val_buy_gauc"], [expected])
        for wrong, message in (
            ({"clik": y["click"]}, r"entries for \['clik'\]"),
            ({"buy": buy}, r"Missing: \['click'\]"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                gauc = models.GroupAUC(x, wrong, groups)
                model.fit(x, of_both, verbose=0, callbacks=[gauc])

    def test_what_is_no_sequence(self):
        for make, message in (
            (lambda: models.TaskSpec("a", class_weights=3.0), "class_weights"),
            (lambda: as_tasks(None), "tasks"),
            (lambda: callbacks.CombineLogs("val_auc"), "weights"),
        ):
            with self.assertRaisesRegex(ValueError, f"`{message}` must be a"):
                make()
