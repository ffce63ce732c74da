import contextlib
import functools
import os

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import metrics
from keras_moe import models
from keras_moe.recommendation.tasks.assemble import assemble
from tests.replicas import two_replicas
from tests.test_case import TestCase

WEIGHTINGS = (
    *("static", "uncertainty", "dwa", "rlw", "gls", "famo"),
    *("gradnorm", "pcgrad"),
)
SPEC = models.TaskSpec
ALL_TYPES = (
    SPEC("click", tower_units=(4,)),
    SPEC("buy", tower_units=(4,), sample_space="click"),
    SPEC("stars", "multiclass", num_classes=3, tower_units=()),
    SPEC("watch", "regression", tower_units=(), weight=0.5),
)


def make_data(n=96, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, 4)), rng.normal(size=n)
    z = a @ [1.0, -1.0, 0.5, 0.2]
    y = {
        "click": (z > 0) * 1.0,
        "buy": (z + b > 0) * 1.0,
        "stars": np.clip(np.round(z + 1), 0, 2),
        "watch": z + b,
    }
    y["buy"][::3] = np.nan
    y["watch"][: n // 2] = np.nan
    x = {"a": a.astype("float32"), "b": b.astype("float32")}
    return x, {name: label.astype("float32") for name, label in y.items()}


def make_model(tasks=ALL_TYPES, heads="towers", trunk=None, **kwargs):
    inputs = {
        "a": keras.Input((4,), name="a"),
        "b": keras.Input((), name="b"),
    }
    trunk = trunk or keras.layers.Dense(8, "relu", name="trunk")
    parts = assemble(tasks, lambda x: x, trunk, heads, inputs=inputs)
    return without_xla(models.MultiTaskModel(**parts, **kwargs))


def without_xla(model):
    """TensorFlow compiles most of the time; gated_models_test.py has XLA."""
    model.supports_jit = keras.config.backend() != "tensorflow"
    return model


def linear_model(tasks):
    """Linear predictions of one hidden layer, from the same numbers always."""
    inputs = {"a": keras.Input((4,), name="a")}
    dense = functools.partial(
        keras.layers.Dense,
        use_bias=False,
        kernel_initializer=keras.initializers.Constant(0.1),
    )
    x = dense(len(tasks), name="shared")(dense(4, name="mixed")(inputs["a"]))
    outputs = {t.name: x[:, i : i + 1] for i, t in enumerate(tasks)}
    return without_xla(models.MultiTaskModel(inputs, outputs, tasks))


def values_of(model):
    return [keras.ops.convert_to_numpy(v) for v in model.weights]


class MultiTaskModelTest(TestCase):
    @parameterized.parameters(*WEIGHTINGS)
    def test_fit_and_save(self, weighting):
        x, y = make_data()
        model = make_model()
        model.compile(keras.optimizers.Adam(0.02), task_weighting=weighting)
        before = model.evaluate(x, y, verbose=0, return_dict=True)
        history = model.fit(
            x, y, epochs=3, batch_size=32, verbose=0, validation_data=(x, y)
        ).history
        logs = {key: values[-1] for key, values in history.items()}
        self.assertFalse(np.isnan(list(logs.values())).any(), logs)
        self.assertContainsSubset(
            {
                *("click_auc", "buy_auc", "stars_accuracy", "watch_rmse"),
                *(f"val_{t.name}_loss" for t in ALL_TYPES),
            },
            logs,
        )
        self.assertLess(logs["val_loss"], before["loss"])
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        again = keras.models.load_model(path)
        self.assertIsInstance(again, models.MultiTaskModel)
        for one, other in zip(values_of(model), values_of(again), strict=True):
            np.testing.assert_array_equal(one, other)
        self.assertEqual(
            model.evaluate(x, y, verbose=0, return_dict=True),
            again.evaluate(x, y, verbose=0, return_dict=True),
        )
        again.fit(x, y, epochs=1, verbose=0)
        bare = keras.models.load_model(path, compile=False)
        expected = model.predict(x, verbose=0)
        self.assertEqual(set(expected), {t.name for t in ALL_TYPES})
        for name, prediction in bare.predict(x, verbose=0).items():
            np.testing.assert_allclose(
                prediction, expected[name], rtol=1e-5, atol=1e-6
            )

    def test_loss_and_metrics_by_hand(self):
        x, y = make_data()
        model = make_model()
        model.compile(metrics={"click": ["auto", "binary_accuracy"]})
        # Batches of different numbers of labels.
        logs = model.evaluate(x, y, batch_size=40, verbose=0, return_dict=True)
        p = model.predict(x, verbose=0)
        click, buy = p["click"][:, 0], p["buy"][:, 0]

        def entropy(label, p):
            return -np.mean(label * np.log(p) + (1 - label) * np.log(1 - p))

        inside = (y["click"] == 1) & ~np.isnan(y["buy"])
        known = ~np.isnan(y["watch"])
        stars = p["stars"][np.arange(96), y["stars"].astype(int)]
        expected = {
            "click_loss": entropy(y["click"], click),
            "buy_loss": entropy(y["buy"][inside], buy[inside]),
            "stars_loss": -np.mean(np.log(stars)),
            "watch_loss": np.mean((y["watch"] - p["watch"][:, 0])[known] ** 2),
            "click_binary_accuracy": np.mean((click > 0.5) == y["click"]),
        }
        for key, value in expected.items():
            np.testing.assert_allclose(logs[key], value, rtol=1e-4, err_msg=key)
        # In one batch the sum of the task losses is the loss itself.
        logs = model.evaluate(x, y, batch_size=96, verbose=0, return_dict=True)
        total = sum(logs[f"{t.name}_loss"] * t.weight for t in ALL_TYPES)
        np.testing.assert_allclose(logs["loss"], total, rtol=1e-5)

    def test_missing_labels_are_as_if_not_there(self):
        x, y = make_data()
        some = np.arange(96) % 3 != 0
        coded = [SPEC("click", missing_value=-1)]
        steps = []
        for tasks, data, label in (
            ([SPEC("click")], x, np.where(some, y["click"], np.nan)),
            (coded, x, np.where(some, y["click"], -1)),
            (
                [SPEC("click")],
                {k: v[some] for k, v in x.items()},
                y["click"][some],
            ),
        ):
            keras.utils.set_random_seed(1)
            model = make_model(tasks)
            model.compile(keras.optimizers.SGD(0.5))
            logs = model.train_on_batch(
                data, {"click": label}, return_dict=True
            )
            steps.append([*values_of(model), logs["click_auc"]])
        for other in steps[:-1]:
            for one, two in zip(steps[-1], other, strict=True):
                np.testing.assert_allclose(one, two, atol=1e-6)

    @parameterized.parameters(*WEIGHTINGS)
    def test_task_without_labels_in_a_batch(self, weighting):
        x, y = make_data()
        y = {**y, "buy": y["buy"] * np.nan}
        model = make_model()
        model.compile(keras.optimizers.SGD(0.1), task_weighting=weighting)
        before = values_of(model.get_layer("buy_logits"))
        for _ in range(2):
            logs = model.train_on_batch(x, y, return_dict=True)
            self.assertFalse(np.isnan(logs["loss"]))
            self.assertTrue(np.isnan(logs["buy_loss"]))
            self.assertTrue(np.isnan(logs["buy_auc"]))
        for value in values_of(model):
            self.assertFalse(np.isnan(value).any())
        after = values_of(model.get_layer("buy_logits"))
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_task_without_positives(self):
        x, y = make_data()
        y = {**y, "click": np.zeros(96, "float32")}
        model = make_model([SPEC("click")])
        model.compile(
            "sgd",
            metrics={
                "click": [
                    "auto",
                    metrics.Calibration(),
                    metrics.NormalizedEntropy(),
                ]
            },
        )
        logs = model.evaluate(
            x, {"click": y["click"]}, verbose=0, return_dict=1
        )
        self.assertFalse(np.isnan(logs["click_loss"]))
        for name in ("auc", "calibration", "normalized_entropy"):
            self.assertTrue(np.isnan(logs[f"click_{name}"]))

    @parameterized.parameters("gls", "famo")
    def test_task_of_weight_zero(self, weighting):
        x, y = make_data()
        steps = []
        for weight in (0.0, None):
            keras.utils.set_random_seed(0)
            tasks = [SPEC("click"), SPEC("watch", "regression")]
            if weight is not None:
                tasks.append(SPEC("buy", weight=weight))
            model = make_model(tasks)
            model.get_layer("trunk").set_weights(
                [np.ones((5, 8)) / 5, np.zeros(8)]
            )
            for task in tasks:
                layer = model.get_layer(f"{task.name}_tower_0")
                layer.set_weights([np.ones((8, 64)) / 8, np.zeros(64)])
                layer = model.get_layer(f"{task.name}_logits")
                layer.set_weights([np.ones((64, 1)) / 64, np.zeros(1)])
            model.compile(keras.optimizers.SGD(0.1), task_weighting=weighting)
            model.train_on_batch(x, y)
            steps.append(values_of(model.get_layer("trunk")))
        for one, other in zip(*steps, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)

    def test_sample_weights(self):
        x, y = make_data()
        tasks = [SPEC("click"), SPEC("watch", "regression")]
        weight = np.linspace(0, 2, 96).astype("float32")
        model = make_model(tasks)
        model.compile(weighted_metrics={"click": ["binary_accuracy"]})
        p = model.predict(x, verbose=0)
        click, watch = p["click"][:, 0], p["watch"][:, 0]
        entropy = -np.log(np.where(y["click"] == 1, click, 1 - click))
        squared = ((y["watch"] - watch) ** 2)[48:]
        right = (click > 0.5) == y["click"]
        for given, of_watch in (
            (weight, weight[48:]),
            ({"click": weight, "watch": np.ones(96)}, np.ones(48)),
            ({"click": weight, "watch": weight}, weight[48:]),
        ):
            logs = model.evaluate(
                x,
                {t.name: y[t.name] for t in tasks},
                batch_size=96,
                sample_weight=given,
                verbose=0,
                return_dict=True,
            )
            expected = {
                "click_loss": np.mean(entropy * weight),
                "watch_loss": np.mean(squared * of_watch),
                "click_binary_accuracy": np.average(right, weights=weight),
            }
            for key, value in expected.items():
                np.testing.assert_allclose(logs[key], value, rtol=1e-4)

    def test_uncertainty_is_trained_and_forgotten(self):
        x, y = make_data()
        model = make_model()
        model.compile(keras.optimizers.SGD(0.1), task_weighting="uncertainty")
        weights = len(model.weights)
        before = keras.ops.convert_to_numpy(model.task_weighting.task_weights())
        model.fit(x, y, epochs=2, verbose=0)
        after = keras.ops.convert_to_numpy(model.task_weighting.task_weights())
        self.assertGreater(np.abs(after - before).min(), 1e-4)
        model.compile("sgd", task_weighting="uncertainty")
        self.assertLen(model.weights, weights)
        model.compile("sgd", task_weighting="gls")
        self.assertLen(model.weights, weights - 1)
        model.fit(x, y, verbose=0)

    def test_one_step_of_uncertainty(self):
        # Two steps, so that gradients of the first that stay would show.
        x, y = make_data()
        tasks = [SPEC("click"), SPEC("watch", "regression")]
        y = {t.name: y[t.name] for t in tasks}
        model = make_model(tasks)
        model.compile(keras.optimizers.SGD(0.1), task_weighting="uncertainty")
        s = np.zeros(2)
        for _ in range(2):
            model.reset_metrics()
            logs = model.train_on_batch(x, y, return_dict=True)
            losses = np.array([logs["click_loss"], logs["watch_loss"]])
            halves = np.array([1.0, 0.5])
            np.testing.assert_allclose(
                logs["loss"],
                np.sum(halves * np.exp(-s) * losses + s / 2),
                rtol=1e-4,
            )
            s = s - 0.1 * (0.5 - halves * np.exp(-s) * losses)
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(model.task_weighting.task_weights()),
            halves * np.exp(-s),
            rtol=1e-4,
        )

    def test_dwa_changes_between_epochs(self):
        x, y = make_data()
        model = make_model()
        model.compile("adam", task_weighting="dwa")
        history = model.fit(x, y, epochs=3, verbose=0).history
        losses = np.array(
            [history[f"{t.name}_loss"] for t in ALL_TYPES]
        )  # (T, epochs)
        model = make_model()
        keras.utils.set_random_seed(3)
        model.compile("adam", task_weighting="dwa")
        history = model.fit(x, y, epochs=2, batch_size=96, verbose=0).history
        losses = np.array([history[f"{t.name}_loss"] for t in ALL_TYPES])
        ratios = np.exp(losses[:, 1] / losses[:, 0] / 2)
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(model.task_weighting.task_weights()),
            4 * ratios / ratios.sum(),
            rtol=1e-4,
        )

    def task_gradients(self, tasks, x, y):
        """Each task's gradients, from a step that only it takes part in."""
        rows = []
        for task in tasks:
            keras.utils.set_random_seed(0)
            alone = [
                SPEC(t.name, "regression", weight=float(t.name == task.name))
                for t in tasks
            ]
            model = linear_model(alone)
            start = values_of(model)
            model.compile(keras.optimizers.SGD(1.0))
            model.train_on_batch(x, y)
            rows.append(
                np.concatenate(
                    [
                        np.ravel(a - b)
                        for a, b in zip(
                            start, values_of(model)[:2], strict=True
                        )
                    ]
                )
            )
        return np.stack(rows), np.concatenate([np.ravel(v) for v in start])

    def test_steps_with_gradients(self):
        x, y = make_data()
        x = {"a": x["a"]}
        # Two tasks that disagree, but not about everything.
        y = {"p": y["click"] * 5, "q": x["a"][:, 0] - y["click"] * 5}
        tasks = [SPEC("p", "regression"), SPEC("q", "regression", weight=0.5)]
        gradients, start = self.task_gradients(tasks, x, y)
        gradients *= [[1.0], [0.5]]

        def step(weighting):
            keras.utils.set_random_seed(0)
            model = linear_model(tasks)
            model.compile(keras.optimizers.SGD(1.0), task_weighting=weighting)
            model.train_on_batch(x, y)
            moved = np.concatenate([np.ravel(v) for v in values_of(model)[:2]])
            return start - moved, model.task_weighting

        p, q = gradients
        product = p @ q
        self.assertLess(product, -0.1)
        expected = p + q - product / (q @ q) * q - product / (p @ p) * p
        moved, _ = step("pcgrad")
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-3)
        moved, weighting = step(models.GradNorm(learning_rate=0.1))
        np.testing.assert_allclose(moved, p + q, rtol=1e-3, atol=1e-3)
        norms = np.linalg.norm(gradients, axis=1)
        factors = 1 - 0.1 * norms * np.sign(norms - norms.mean())
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(weighting.task_weights()),
            2 * factors / factors.sum(),
            rtol=1e-3,
        )

    def test_gradients_do_not_change_the_state_twice(self):
        x, y = make_data()
        outcomes = []
        for weighting in ("static", models.GradNorm()):
            keras.utils.set_random_seed(0)
            trunk = keras.Sequential(
                [
                    keras.layers.Dense(8),
                    keras.layers.BatchNormalization(),
                    keras.layers.Dropout(0.5, seed=1),
                ]
            )
            model = make_model(trunk=trunk)
            model.compile(keras.optimizers.SGD(0.1), task_weighting=weighting)
            model.train_on_batch(x, y)
            outcomes.append(values_of(model.get_layer(trunk.name)))
        # The first step of GradNorm has weights of 1.
        for one, other in zip(*outcomes, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)

    @parameterized.parameters("mixed_bfloat16", "mixed_float16")
    def test_mixed_precision(self, policy):
        x, y = make_data()
        previous = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            model = make_model()
            model.compile("adam", task_weighting="uncertainty")
            logs = model.train_on_batch(x, y, return_dict=True)
        finally:
            keras.config.set_dtype_policy(previous)
        self.assertFalse(np.isnan(logs["loss"]))
        for output in model.outputs:
            self.assertEqual(output.dtype, "float32")

    def test_compiled(self):
        if keras.config.backend() != "tensorflow":
            self.skipTest("JAX always compiles; PyTorch takes a minute")
        x, y = make_data()
        # Of two, since XLA draws other orders for PCGrad.
        tasks = ALL_TYPES[::3]
        for weighting in ("uncertainty", "dwa", "pcgrad", "gradnorm"):
            losses = []
            for jit_compile in (False, True):
                keras.utils.set_random_seed(0)
                model = make_model(tasks)
                model.supports_jit = True
                model.compile(
                    "sgd", task_weighting=weighting, jit_compile=jit_compile
                )
                logs = model.fit(x, y, epochs=2, verbose=0, shuffle=False)
                losses.append(logs.history["loss"])
            np.testing.assert_allclose(*losses, rtol=1e-3)

    def test_data_parallelism_on_jax(self):
        if keras.config.backend() != "jax":
            self.skipTest("of keras.distribution")
        x, y = make_data()
        for weighting in ("uncertainty", "famo", "pcgrad"):
            losses = []
            for distribution in (None, keras.distribution.DataParallel()):
                keras.distribution.set_distribution(distribution)
                try:
                    keras.utils.set_random_seed(0)
                    model = make_model()
                    model.compile("sgd", task_weighting=weighting)
                    history = model.fit(x, y, verbose=0, shuffle=False).history
                    losses.append(history["loss"])
                finally:
                    keras.distribution.set_distribution(None)
            np.testing.assert_allclose(*losses, rtol=1e-4)

    def test_strategies_of_tensorflow(self):
        if keras.config.backend() != "tensorflow":
            self.skipTest("of TensorFlow")

        x, y = make_data()
        # In each half of a batch as many labels.
        y["watch"] = np.nan_to_num(y["watch"])
        tasks = [SPEC("click"), SPEC("watch", "regression")]
        y = {task.name: y[task.name] for task in tasks}
        strategy = two_replicas()
        losses = []
        for scope in (contextlib.nullcontext, strategy.scope):
            keras.utils.set_random_seed(0)
            with scope():
                trunk = keras.layers.Dense(
                    8, kernel_regularizer=keras.regularizers.L2(0.1)
                )
                model = make_model(tasks, trunk=trunk)
                model.compile(keras.optimizers.SGD(0.1))
                history = model.fit(
                    x,
                    y,
                    epochs=2,
                    batch_size=96,
                    verbose=0,
                    shuffle=False,
                    validation_data=(x, y),
                ).history
            logs = ("loss", "watch_loss", "val_loss")
            losses.append([history[name] for name in logs])
        np.testing.assert_allclose(*losses, rtol=1e-4)
        with self.assertRaisesRegex(ValueError, "each replica would weigh"):
            model.compile("sgd", task_weighting="dwa")

    def test_frozen_layers_stay_frozen(self):
        model = make_model()
        model.get_layer("trunk").trainable = False
        again = models.MultiTaskModel.from_config(model.get_config())
        self.assertFalse(again.get_layer("trunk").trainable)
        self.assertTrue(again.get_layer("click_logits").trainable)

    def test_subclass_with_arguments_of_its_own(self):
        @keras.saving.register_keras_serializable("keras_moe_tests")
        class Linear(models.MultiTaskModel):
            def __init__(self, tasks, dim, **kwargs):
                inputs = {"a": keras.Input((dim,), name="a")}
                trunk = keras.layers.Dense(3)
                super().__init__(
                    **assemble(tasks, lambda x: x, trunk, inputs=inputs),
                    **kwargs,
                )
                self.dim = dim

            def get_config(self):
                return {
                    "tasks": [t.name for t in self.tasks],
                    "dim": self.dim,
                    "name": self.name,
                }

        x, y = make_data()
        model = Linear(["click"], 4, name="linear")
        model.compile("adam", task_weighting="uncertainty")
        model.fit(x, y, verbose=0)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        again = keras.models.load_model(path)
        self.assertIsInstance(again, Linear)
        self.assertEqual(
            model.evaluate(x, y, verbose=0), again.evaluate(x, y, verbose=0)
        )

    def test_single_input(self):
        x, y = make_data()
        inputs = keras.Input((4,), name="a")
        outputs = {"click": keras.layers.Dense(1, "sigmoid")(inputs)}
        model = models.MultiTaskModel(inputs, outputs, ["click"])
        again = models.MultiTaskModel.from_config(model.get_config())
        again.set_weights(model.get_weights())
        np.testing.assert_array_equal(
            model.predict(x["a"], verbose=0)["click"],
            again.predict(x["a"], verbose=0)["click"],
        )

    def test_added_losses(self):
        x, y = make_data()
        y = {"click": y["click"]}
        regular = keras.layers.Dense(8, kernel_regularizer="l2", name="trunk")
        model = make_model([SPEC("click")], trunk=regular)
        model.compile()
        logs = model.evaluate(x, y, batch_size=96, verbose=0, return_dict=True)
        added = 0.01 * np.sum(values_of(regular)[0] ** 2)
        np.testing.assert_allclose(
            logs["loss"], logs["click_loss"] + added, rtol=1e-5
        )

    def test_losses_of_ones_own(self):
        x, y = make_data()

        def absolute(y_true, y_pred):
            return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)

        tasks = [SPEC("watch", "regression"), SPEC("click")]
        model = make_model(tasks)
        results = []
        for loss in (absolute, "mae", keras.losses.MeanAbsoluteError()):
            model.compile(loss={"watch": loss, "click": "auto"}, metrics=None)
            results.append(model.evaluate(x, y, verbose=0, return_dict=True))
        self.assertEqual(results[0], results[1])
        self.assertEqual(results[0], results[2])
        known = ~np.isnan(y["watch"])
        p = model.predict(x, verbose=0)["watch"][:, 0]
        np.testing.assert_allclose(
            results[0]["watch_loss"],
            np.mean(np.abs(p - y["watch"])[known]),
            rtol=1e-5,
        )
        self.assertEqual(set(results[0]), {"loss", "watch_loss", "click_loss"})

    def test_one_task(self):
        x, y = make_data()
        model = make_model(["click"])
        model.compile("adam")
        logs = model.fit(x, y["click"], verbose=0).history
        self.assertEqual(set(logs), {"loss", "click_loss", "click_auc"})
        self.assertEqual(model.predict(x, verbose=0)["click"].shape, (96, 1))

    def test_errors(self):
        x, y = make_data()
        model = make_model()
        for kwargs, message in (
            ({"loss_weights": {"click": 2.0}}, "`TaskSpec.weight`"),
            ({"loss": {"clik": "mse"}}, "`loss` must be 'auto', or a dict"),
            ({"metrics": ["auc"]}, "`metrics` must be 'auto', or a dict"),
            ({"task_weighting": "fair"}, "`task_weighting` must be one of"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                model.compile("adam", **kwargs)
        model.compile("adam")
        with self.assertRaisesRegex(ValueError, "Missing: \\['watch'\\]"):
            model.fit(
                x, {k: v for k, v in y.items() if k != "watch"}, verbose=0
            )
        with self.assertRaisesRegex(ValueError, "has no label at all"):
            model.fit(x, {**y, "buy": y["buy"] * np.nan}, verbose=0)
        with self.assertRaisesRegex(ValueError, "must be from 0 to 1"):
            model.evaluate(x, {**y, "click": y["click"] * 5}, verbose=0)
        with self.assertRaises(ValueError):
            model.fit({"a": x["a"]}, y, verbose=0)
        inputs = {"a": keras.Input((4,), name="a")}
        one = keras.layers.Dense(1)(inputs["a"])
        two = keras.layers.Dense(2)(inputs["a"])
        for given, outputs, message in (
            (inputs, {"b": one}, "one tensor a task"),
            (inputs, one, "one tensor a task"),
            (inputs, {"click": two}, "must be of shape \\(batch, 1\\)"),
            ({"x": inputs["a"]}, {"click": one}, "by their names"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                models.MultiTaskModel(given, outputs, ["click"])
