import keras
import numpy as np

from keras_moe import layers
from keras_moe import models
from keras_moe.recommendation.tasks.assemble import assemble
from keras_moe.recommendation.tasks.heads import AITMHeads
from keras_moe.recommendation.tasks.heads import split_tasks
from keras_moe.recommendation.tasks.task_spec import as_tasks
from tests.recommendation.tasks.multi_task_model_test import make_data
from tests.recommendation.tasks.multi_task_model_test import make_model
from tests.test_case import TestCase

CHAIN = (
    models.TaskSpec("click", tower_units=(4,)),
    models.TaskSpec("cart", tower_units=(4,), sample_space="click"),
    models.TaskSpec("buy", tower_units=(4,), sample_space="cart"),
    models.TaskSpec("watch", "regression", tower_units=(4, 2)),
)


def chain_data():
    x, y = make_data()
    label = (np.arange(96) % 4).astype("float32")
    y = {
        "click": (label > 0) * 1.0,
        "cart": (label > 1) * 1.0,
        "buy": (label > 2) * 1.0,
        "watch": y["watch"],
    }
    return x, y


class HeadsTest(TestCase):
    def test_towers(self):
        model = make_model(CHAIN)
        for task in CHAIN:
            names = [
                layer.name
                for layer in model.layers
                if layer.name.startswith(f"{task.name}_")
            ]
            self.assertLen(names, len(task.tower_units) + 1)
        self.assertFalse(model.entire_space)
        dropped = make_model([models.TaskSpec("c", tower_dropout=0.5)])
        self.assertEqual(dropped.get_layer("c_dropout_0").rate, 0.5)

    def test_esmm(self):
        x, y = chain_data()
        model = make_model(CHAIN, heads="esmm")
        self.assertTrue(model.entire_space)
        p = model.predict(x, verbose=0)
        own = keras.Model(
            model.inputs,
            {
                name: model.get_layer(f"{name}_conditional").output
                for name in ("cart", "buy")
            },
        ).predict(x, verbose=0)
        cart = p["click"] * own["cart"]
        np.testing.assert_allclose(p["cart"], cart, rtol=1e-5)
        np.testing.assert_allclose(p["buy"], cart * own["buy"], rtol=1e-5)
        model.compile("adam")
        logs = model.evaluate(x, y, batch_size=96, verbose=0, return_dict=True)
        buy = p["buy"][:, 0]  # Over all examples, not only those in the space.
        expected = -np.mean(np.log(np.where(y["buy"] == 1, buy, 1 - buy)))
        np.testing.assert_allclose(logs["buy_loss"], expected, rtol=1e-4)
        config = model.get_config()
        self.assertTrue(models.MultiTaskModel.from_config(config).entire_space)
        model.fit(x, y, verbose=0)

    def test_esmm_errors(self):
        spec = models.TaskSpec
        regression = spec("d", "regression", sample_space="c")
        with self.assertRaisesRegex(ValueError, "must be binary"):
            make_model([spec("c"), regression], heads="esmm")
        with self.assertRaisesRegex(ValueError, "need a task with"):
            make_model([spec("c"), spec("d")], heads="esmm")

    def test_aitm(self):
        x, y = chain_data()
        tasks = CHAIN[:3]
        tasks = [models.TaskSpec(t.name, tower_units=(4,)) for t in tasks]
        transfer = layers.AITMTransfer()
        model = make_model(
            tasks, heads=AITMHeads(transfer, calibration_weight=0.6)
        )
        p = model.predict(x, verbose=0)
        hidden = keras.Model(
            model.inputs,
            [model.get_layer(f"{t.name}_tower_0").output for t in tasks],
        ).predict(x, verbose=0)
        mixed = transfer(np.stack(hidden, axis=1))
        for i, task in enumerate(tasks):
            z = keras.ops.convert_to_numpy(mixed)[:, i]
            dense = model.get_layer(f"{task.name}_logits")
            kernel, bias = map(keras.ops.convert_to_numpy, dense.weights)
            logits = z @ kernel + bias
            np.testing.assert_allclose(
                p[task.name], 1 / (1 + np.exp(-logits)), rtol=1e-4
            )
        model.compile(keras.optimizers.SGD(0.0))
        logs = model.train_on_batch(x, y, return_dict=True)
        losses = sum(logs[f"{t.name}_loss"] for t in tasks)
        above = sum(
            np.mean(np.maximum(p[b.name] - p[a.name], 0))
            for a, b in zip(tasks, tasks[1:], strict=False)
        )
        np.testing.assert_allclose(
            logs["loss"], losses + 0.6 * above, rtol=1e-4
        )
        self.assertEqual(
            model.output_names, sorted(["buy_order", "cart_order", "click"])
        )
        self.assertEqual(set(p), {task.name for task in tasks})
        plain = make_model(tasks, heads="aitm")
        again = models.MultiTaskModel.from_config(plain.get_config())
        again.set_weights(plain.get_weights())
        np.testing.assert_allclose(
            again.predict(x, verbose=0)["buy"],
            plain.predict(x, verbose=0)["buy"],
            rtol=1e-5,
        )
        uneven = [*tasks[:2], models.TaskSpec("buy", tower_units=(3,))]
        with self.assertRaisesRegex(ValueError, "end in the same width"):
            make_model(uneven, heads="aitm")

    def test_split_tasks(self):
        tasks = as_tasks(["a", "b", "c"])
        stacked = keras.KerasTensor((None, 3, 5))
        self.assertEqual(
            [tuple(x.shape) for x in split_tasks(stacked, tasks)],
            [(None, 5)] * 3,
        )
        one = keras.KerasTensor((None, 5))
        self.assertEqual(split_tasks(one, tasks), [one] * 3)
        self.assertEqual(split_tasks([one] * 3, tasks), [one] * 3)
        for wrong in ([one] * 2, keras.KerasTensor((None, 2, 5))):
            with self.assertRaisesRegex(ValueError, "A trunk for 3 tasks"):
                split_tasks(wrong, tasks)

    def test_embeddings_of_other_kinds(self):
        x, y = make_data()
        inputs = {
            "a": keras.Input((4,), name="a"),
            "b": keras.Input((), name="b"),
        }

        @keras.saving.register_keras_serializable("keras_moe_tests")
        class Side(keras.layers.Layer):
            def call(self, inputs):
                b = keras.ops.expand_dims(inputs["b"], -1)
                return {"b": b, "a": keras.ops.expand_dims(inputs["a"], 1)}

        model = models.MultiTaskModel(
            **assemble(
                ["click"],
                Side(),
                keras.layers.Dense(3),
                inputs=inputs,
            )
        )
        self.assertEqual(model.get_layer("click_tower_0").input.shape[1], 3)
        model.compile("adam")
        model.fit(x, y, verbose=0)
        with self.assertRaisesRegex(ValueError, "`inputs`, a dict of"):
            assemble(["click"], Side(), keras.layers.Dense(3))
        with self.assertRaisesRegex(ValueError, "must not have the name of a"):
            assemble(["a"], Side(), keras.layers.Dense(3), inputs=inputs)
        with self.assertRaisesRegex(ValueError, "`heads` must be one of"):
            make_model(["click"], heads="tower")

    def test_feature_space(self):
        try:
            import tensorflow as tf
        except ImportError:
            self.skipTest("FeatureSpace preprocesses with TensorFlow")
        raw = {"city": ["x", "y", "x", "z"], "age": [1.0, 2.0, 3.0, 4.0]}
        data = tf.data.Dataset.from_tensor_slices(raw).batch(2)
        for mode in ("concat", "dict"):
            space = keras.utils.FeatureSpace(
                {"city": "string_categorical", "age": "float_normalized"},
                output_mode=mode,
            )
            space.adapt(data)
            model = models.MultiTaskModel(
                **assemble(["click"], space, keras.layers.Dense(3))
            )
            model.compile("adam")
            labels = {"click": np.array([0, 1, 0, 1], "float32")}
            dataset = tf.data.Dataset.from_tensor_slices((raw, labels)).batch(2)
            model.fit(dataset.map(lambda x, y, f=space: (f(x), y)), verbose=0)

    def test_feature_embedding(self):
        x, y = make_data()
        features = layers.FeatureEmbedding(
            [layers.Embedded("a", 4), layers.Numeric("b", normalize=None)]
        )
        model = models.MultiTaskModel(
            **assemble(["click"], features, keras.layers.Dense(3))
        )
        model.compile("adam")
        model.fit(x, y, verbose=0)
        with self.assertRaisesRegex(ValueError, "missing from the inputs"):
            model.fit({"a": x["a"], "bb": x["b"]}, y, verbose=0)
        with self.assertRaisesRegex(ValueError, "'b' must be of shape"):
            model.evaluate({"a": x["a"], "b": x["a"]}, y, verbose=0)
        with self.assertRaisesRegex(ValueError, "'b' must be made of numbers"):
            model.fit({**x, "b": np.array(["1"] * 96)}, y, verbose=0)


class OrderPenaltyTest(TestCase):
    def test_loss_in_training_alone(self):
        layer = models.OrderPenalty(weight=2.0)
        p_before = np.array([[0.5], [0.25]], "float32")
        p = np.array([[0.25], [0.75]], "float32")
        outputs = layer([p_before, p], training=True)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(outputs), p)
        np.testing.assert_allclose(float(layer.losses[0]), 0.5)
        layer([p_before, p], training=False)
        self.assertEqual(layer.losses, [])
        with self.assertRaisesRegex(ValueError, "`weight` must be"):
            models.OrderPenalty(weight=-1.0)
        again = models.OrderPenalty.from_config(layer.get_config())
        self.assertEqual(again.weight, 2.0)

    def test_description_of_tf_data(self):
        try:
            import tensorflow as tf
        except ImportError:
            self.skipTest("needs TensorFlow")
        features = layers.FeatureEmbedding(
            [layers.Categorical("city", num_ids=3), layers.Numeric("age")],
            embedding_dim=2,
        )
        features.adapt({"city": [0, 1, 2], "age": [1.0, 2.0, 3.0]})
        model = models.MultiTaskModel(
            **assemble(["click"], features, keras.layers.Dense(3))
        )
        model.compile("adam")
        good = {"city": np.array([0, 2, -1]), "age": np.array([1, 2, 3])}
        y = {"click": np.array([0.0, 1.0, 1.0])}

        def fit(x, y=y, run=model.fit):
            data = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
            run(data, verbose=0)

        fit(good)
        # Floats may hold NaN, which would become an unknown id in silence.
        for name, values, message in (
            ("city", np.array([0.0, np.nan, 1.0]), "'city' must be made of wh"),
            ("city", np.array(["x", "y", "z"]), "'city' must be made of numb"),
            ("age", np.array(["1", "2", "3"]), "'age' must be made of numbers"),
        ):
            for run in (model.fit, model.evaluate):
                with self.assertRaisesRegex(ValueError, message):
                    fit({**good, name: values}, run=run)
        with self.assertRaisesRegex(ValueError, "missing from the inputs"):
            fit({"city": good["city"]})
