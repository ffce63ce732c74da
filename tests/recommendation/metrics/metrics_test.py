import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import metrics
from tests.test_case import TestCase


def auc_of_pairs(y, p, weight=None):
    weight = np.ones(len(y)) if weight is None else weight
    wins = total = 0.0
    for i in np.flatnonzero(y == 1):
        for j in np.flatnonzero(y == 0):
            wins += weight[i] * weight[j] * ((p[i] > p[j]) + (p[i] == p[j]) / 2)
            total += weight[i] * weight[j]
    return wins / total if total else np.nan


class MetricsTest(TestCase):
    def test_auc(self):
        rng = np.random.default_rng(0)
        y = (rng.random(200) < 0.3).astype("float32")
        for scale in (1.0, 0.01):  # Rare events too.
            p = scale / (1 + np.exp(-rng.normal(size=200) - y))
            p[:20] = p[20:40]
            weight = rng.uniform(0, 2, 200)
            metric = metrics.BinaryAUC()
            for part in np.split(np.arange(200), [70, 71]):
                metric.update_state(y[part], p[part, None])
            expected = auc_of_pairs(y, p)
            np.testing.assert_allclose(metric.result(), expected, atol=1e-3)
            metric.reset_state()
            metric.update_state(y[:, None], p, weight)
            expected = auc_of_pairs(y, p, weight)
            np.testing.assert_allclose(metric.result(), expected, atol=1e-3)

    def test_auc_at_the_ends(self):
        metric = metrics.BinaryAUC()
        self.assertTrue(np.isnan(metric.result()))
        metric.update_state([1, 1], [0.0, 1.0])
        self.assertTrue(np.isnan(metric.result()))
        metric.update_state([0, 0], [0.0, 0.5])
        # Of four pairs a tie, a loss and two that are won.
        np.testing.assert_allclose(metric.result(), 2.5 / 4)
        metric = metrics.BinaryAUC()
        metric.update_state(np.zeros(3), np.ones(3) / 2)
        self.assertTrue(np.isnan(metric.result()))

    def test_model_that_has_diverged(self):
        nan = float("nan")
        metric = metrics.BinaryAUC()
        metric.update_state([0, 1], [0.1, nan], [1.0, 0.0])
        metric.update_state([0, 1], [0.1, 0.2])
        np.testing.assert_allclose(metric.result(), 1.0)
        metric.update_state([0, 1], [0.1, nan])
        self.assertTrue(np.isnan(metric.result()))
        p = np.array([0.2, nan, 0.3, 0.4])
        self.assertTrue(np.isnan(metrics.group_auc([0, 1, 1, 0], p, [1] * 4)))
        np.testing.assert_allclose(
            metrics.group_auc([0, nan, 1, 0], p, [1] * 4), 0.5
        )

    def test_calibration_and_normalized_entropy(self):
        rng = np.random.default_rng(0)
        y = (rng.random(100) < 0.3).astype("float32")
        p = rng.uniform(0.1, 0.9, 100).astype("float32")
        weight = rng.uniform(0, 2, 100).astype("float32")
        for w in (None, weight):
            calibration = metrics.Calibration()
            entropy = metrics.NormalizedEntropy()
            for part in (np.arange(30), np.arange(30, 100)):
                given = (y[part], p[part, None], None if w is None else w[part])
                calibration.update_state(*given)
                entropy.update_state(*given)
            w = np.ones(100) if w is None else w
            np.testing.assert_allclose(
                calibration.result(), np.sum(w * p) / np.sum(w * y), rtol=1e-5
            )
            losses = -np.log(np.where(y == 1, p, 1 - p))
            rate = np.average(y, weights=w)
            base = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
            np.testing.assert_allclose(
                entropy.result(),
                np.average(losses, weights=w) / base,
                rtol=1e-5,
            )
        for metric in (metrics.Calibration(), metrics.NormalizedEntropy()):
            self.assertTrue(np.isnan(metric.result()))
            metric.update_state(np.zeros(3), np.ones(3) / 2)
            self.assertTrue(np.isnan(metric.result()))

    def test_masked(self):
        y = np.array([1, np.nan, 0, 1], "float32")
        p = np.array([[0.9], [0.1], [0.8], [0.3]], "float32")
        weight = np.array([1, 5, 2, 1], "float32")
        for inner in (
            keras.metrics.BinaryAccuracy(),
            "binary_accuracy",
            keras.metrics.binary_accuracy,
        ):
            metric = metrics.Masked(inner)
            self.assertEqual(metric.name, "binary_accuracy")
            self.assertTrue(np.isnan(metric.result()))
            metric.update_state(y, p)
            metric.update_state(y[:2] * np.nan, p[:2])
            np.testing.assert_allclose(metric.result(), 1 / 3)
            metric.reset_state()
            self.assertTrue(np.isnan(metric.result()))
            metric.update_state(y[:, None], p, weight)
            np.testing.assert_allclose(metric.result(), 1 / 4)
        metric = metrics.Masked(keras.metrics.RootMeanSquaredError())
        metric.update_state(y, p[:, 0])
        squares = (y - p[:, 0])[[0, 2, 3]] ** 2
        np.testing.assert_allclose(
            metric.result(), np.sqrt(squares.mean()), rtol=1e-6
        )
        metric = metrics.Masked(keras.metrics.SparseCategoricalAccuracy())
        metric.update_state(
            np.array([2, np.nan, 0]),
            np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
        )
        np.testing.assert_allclose(metric.result(), 0.5)
        with self.assertRaisesRegex(ValueError, "`metric` must be a metric"):
            metrics.Masked(None)

    @parameterized.parameters(
        lambda: metrics.BinaryAUC(num_bins=100, name="x"),
        lambda: metrics.Calibration(name="x"),
        lambda: metrics.NormalizedEntropy(name="x"),
        lambda: metrics.Masked(metrics.BinaryAUC(num_bins=10), name="x"),
    )
    def test_config(self, make):
        metric = make()
        config = keras.saving.serialize_keras_object(metric)
        again = keras.saving.deserialize_keras_object(config)
        self.assertEqual(again.get_config(), metric.get_config())
        y, p = np.array([0, 1, 1]), np.array([0.2, 0.3, 0.1])
        self.assertEqual(float(metric(y, p)), float(again(y, p)))

    def test_bins(self):
        with self.assertRaisesRegex(ValueError, "`num_bins` must be"):
            metrics.BinaryAUC(num_bins=1)

    def test_ties_across_groups_are_none(self):
        # The largest prediction of `a` equals the smallest one of `b`.
        found = metrics.group_auc(
            [0, 1, 0, 1], [0.1, 0.5, 0.5, 0.9], list("aabb")
        )
        self.assertEqual(found, 1.0)
        rng = np.random.default_rng(0)
        for _ in range(50):
            number = rng.integers(4, 12)
            y = (rng.random(number) < 0.5).astype(float)
            p = np.round(rng.random(number), 1)
            groups = rng.integers(0, 3, number)
            sizes, values = [], []
            for group in range(3):
                rows = groups == group
                value = auc_of_pairs(y[rows], p[rows])
                if not np.isnan(value):
                    values.append(value)
                    sizes.append(rows.sum())
            wanted = np.average(values, weights=sizes) if sizes else np.nan
            np.testing.assert_allclose(
                metrics.group_auc(y, p, groups), wanted, atol=1e-12
            )

    def test_group_auc(self):
        rng = np.random.default_rng(0)
        y = (rng.random(300) < 0.4).astype(float)
        y[::10] = np.nan
        p = np.round(rng.random(300), 1)  # With ties.
        groups = rng.choice(["u", "v", "w", "x"], 300, p=[0.6, 0.2, 0.19, 0.01])
        y[groups == "x"] = 1  # Has no AUC.
        known = ~np.isnan(y)
        weights = {
            "size": lambda label: len(label),
            "positives": lambda label: label.sum(),
            "equal": lambda label: 1.0,
        }
        for weighting, weight_of in weights.items():
            values, weight = [], []
            for user in "uvw":
                rows = known & (groups == user)
                values.append(auc_of_pairs(y[rows], p[rows]))
                weight.append(weight_of(y[rows]))
            np.testing.assert_allclose(
                metrics.group_auc(y, p[:, None], groups, weighting),
                np.average(values, weights=weight),
            )
        self.assertTrue(np.isnan(metrics.group_auc([1, 1], [0, 1], [1, 1])))
        self.assertTrue(np.isnan(metrics.group_auc([np.nan], [0], [1])))
        for args, message in (
            (([1, 0], [0.1], [1, 1]), "must be of one size"),
            (([1, 2], [0.1, 0.2], [1, 1]), "must be made of 0, 1 and NaN"),
            (([1, 0], [0.1, 0.2], [1, 1], "sum"), "`weighting` must be"),
            (([1, 0], [0.1, 0.2], np.array(["u", None])), "without `None`"),
        ):
            with self.assertRaisesRegex(ValueError, message):
                metrics.group_auc(*args)
