import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import models
from keras_moe.recommendation.tasks import labels
from keras_moe.recommendation.tasks.task_spec import as_tasks
from tests.test_case import TestCase

NAN = np.nan


def numpy_of(tensors):
    return {k: keras.ops.convert_to_numpy(v) for k, v in tensors.items()}


class TaskSpecTest(TestCase):
    def test_config(self):
        task = models.TaskSpec(
            "stars",
            "multiclass",
            num_classes=3,
            tower_units=[4, 2],
            tower_activation="silu",
            tower_dropout=0.1,
            weight=0.5,
            class_weights=[1, 2, 3],
            sample_space="click",
            missing_value=-1,
        )
        config = keras.saving.serialize_keras_object(task)
        again = keras.saving.deserialize_keras_object(config)
        self.assertEqual(again.get_config(), task.get_config())
        self.assertEqual((again.output_dim, again.activation), (3, "softmax"))

    @parameterized.named_parameters(
        ("name", {"name": ""}, "`name` must be"),
        ("slash", {"name": "a/b"}, "`name` must be"),
        ("type", {"type": "ordinal"}, "`type` must be one of"),
        ("no_classes", {"type": "multiclass"}, "`num_classes` must be"),
        ("classes", {"num_classes": 3}, "is for type='multiclass'"),
        ("units", {"tower_units": 8}, "must be a sequence"),
        ("units_0", {"tower_units": [0]}, "`tower_units` must be"),
        ("dropout", {"tower_dropout": 1.0}, "`tower_dropout` must be"),
        ("weight", {"weight": -1.0}, "`weight` must be"),
        ("weights", {"class_weights": [1, 2, 3]}, "must be 2 numbers"),
        ("weights_sign", {"class_weights": [1, -1]}, "`class_weights` must"),
        (
            "regression",
            {"type": "regression", "class_weights": [1, 2]},
            "has no classes",
        ),
        ("missing", {"missing_value": NAN}, "`missing_value` must be"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            models.TaskSpec(**{"name": "a", **kwargs})

    def test_check_tasks(self):
        tasks = as_tasks(["a", models.TaskSpec("b", sample_space="a")])
        self.assertEqual([t.name for t in tasks], ["a", "b"])
        self.assertEqual(as_tasks("a")[0].type, "binary")
        spec = models.TaskSpec
        for given, message in (
            ([], "at least one"),
            (["a", "a"], "different names"),
            ([3], "must be made of"),
            ([spec("a", sample_space="b")], "another binary task"),
            (
                [spec("a", sample_space="b"), spec("b", "regression")],
                "another binary task",
            ),
            ([spec("a", sample_space="a")], "back to its own"),
            (
                [spec("a", sample_space="b"), spec("b", sample_space="a")],
                "a -> b -> a",
            ),
        ):
            with self.assertRaisesRegex(ValueError, message):
                as_tasks(given)

    def test_labels_and_sample_spaces(self):
        tasks = as_tasks(
            [
                "click",
                models.TaskSpec("cart", sample_space="click"),
                models.TaskSpec("buy", sample_space="cart", missing_value=-1),
            ]
        )
        y = {
            "click": np.array([1, 1, 1, 0, NAN, 1], "float32"),
            "cart": np.array([[1], [0], [NAN], [1], [1], [1]], "float32"),
            "buy": np.array([1, 1, 1, 1, 1, -1], "int32"),
        }
        found = numpy_of(labels.labels_of(tasks, y))
        np.testing.assert_array_equal(found["click"], y["click"])
        np.testing.assert_array_equal(found["cart"], [1, 0, NAN, NAN, NAN, 1])
        np.testing.assert_array_equal(
            found["buy"], [1, NAN, NAN, NAN, NAN, NAN]
        )
        found = numpy_of(labels.labels_of(tasks, y, entire_space=True))
        # Without a click nothing is in the cart, whatever is said.
        np.testing.assert_array_equal(found["cart"], [1, 0, NAN, 0, 1, 1])
        np.testing.assert_array_equal(found["buy"], [1, 0, 1, 0, 1, NAN])

    def test_wrong_labels(self):
        tasks = as_tasks(["a", "b"])
        one = np.ones(3, "float32")
        for y, message in (
            (None, "Missing: \\['a', 'b'\\]"),
            ({"a": one}, "Missing: \\['b'\\]"),
            ({"a": one, "b": np.ones((3, 2))}, "must be of shape"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                labels.labels_of(tasks, y)
        tasks = as_tasks(
            [
                models.TaskSpec("b"),
                models.TaskSpec("r", "regression"),
                models.TaskSpec("m", "multiclass", num_classes=3),
            ]
        )
        good = {"b": one, "r": one * 7, "m": one * 2}
        labels.check_labels(tasks, good)
        labels.check_labels(tasks, [1, 2])  # Not looked into.
        with self.assertRaisesRegex(ValueError, "must be from 0 to 1"):
            labels.check_labels(tasks[:1], one * 2)
        for name, values, message in (
            ("b", one * 2, "binary task 'b' must be from 0 to 1"),
            ("b", -one, "binary task 'b' must be from 0 to 1"),
            ("b", one * NAN, "has no label at all"),
            ("b", np.array(["x"] * 3), "must be numbers"),
            ("r", one * np.inf, "regression task 'r' must be finite"),
            ("m", one * 3, "must be whole numbers from 0 to 2"),
            ("m", one * 0.5, "must be whole numbers from 0 to 2"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                labels.check_labels(tasks, {**good, name: values})

    def test_task_loss(self):
        rng = np.random.default_rng(0)
        weight = rng.uniform(0.5, 2, 6).astype("float32")
        p = rng.uniform(0.1, 0.9, (6, 1)).astype("float32")
        classes = rng.dirichlet(np.ones(3), 6).astype("float32")
        binary = np.array([1, 0, NAN, 1, 0.25, NAN], "float32")
        multi = np.array([2, 0, 1, NAN, 2, 1], "float32")
        spec = models.TaskSpec
        for task, label, pred, per_example in (
            (
                spec("a", class_weights=[1, 3]),
                binary,
                p,
                lambda y, i: (
                    (1 + 2 * y)
                    * -(y * np.log(p[i, 0]) + (1 - y) * np.log(1 - p[i, 0]))
                ),
            ),
            (
                spec("b", "regression"),
                multi,
                p,
                lambda y, i: (y - p[i, 0]) ** 2,
            ),
            (
                spec("c", "multiclass", num_classes=3, class_weights=[1, 2, 3]),
                multi,
                classes,
                lambda y, i: -(1 + y) * np.log(classes[i, int(y)]),
            ),
        ):
            known = [i for i in range(6) if not np.isnan(label[i])]
            expected = sum(per_example(label[i], i) * weight[i] for i in known)
            loss, count = labels.task_loss(
                task,
                labels.resolve_loss(task, "auto"),
                keras.ops.convert_to_tensor(label),
                keras.ops.convert_to_tensor(pred),
                keras.ops.convert_to_tensor(weight),
            )
            self.assertEqual(float(count), len(known))
            np.testing.assert_allclose(
                float(loss), expected / len(known), rtol=1e-5
            )
            loss, count = labels.task_loss(
                task,
                labels.resolve_loss(task, "auto"),
                keras.ops.convert_to_tensor(label * NAN),
                keras.ops.convert_to_tensor(pred),
            )
            self.assertEqual((float(loss), float(count)), (0.0, 0.0))
