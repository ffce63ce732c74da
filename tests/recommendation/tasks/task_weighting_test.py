"""Each weighting beside its formula in NumPy, step by step."""

import itertools

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe import layers
from keras_moe import models
from keras_moe.backend import jacobian
from keras_moe.recommendation.tasks.weighting import named_weightings as named
from keras_moe.recommendation.tasks.weighting.pc_grad import projected_weights
from tests.test_case import TestCase

TASKS = (
    models.TaskSpec("a"),
    models.TaskSpec("b", "regression"),
    models.TaskSpec("c", "multiclass", num_classes=3),
)
# Six steps; task 1 has no label in the third, none has in the fifth.
LOSSES = np.random.default_rng(0).uniform(0.2, 3, (6, 3)).astype("float32")
PRESENT = np.ones((6, 3), "float32")
PRESENT[2, 1] = 0
PRESENT[4] = 0
LOSSES *= PRESENT


def made(weighting):
    weighting.set_tasks(TASKS)
    return weighting


def step(weighting, i, gram=None):
    """The loss of a step, and its gradient for the losses."""
    losses = keras.Variable(LOSSES[i])
    present = keras.ops.convert_to_tensor(PRESENT[i])
    if gram is not None:
        gram = keras.ops.convert_to_tensor(gram)
    values = []

    def total(inputs):
        value = weighting.combine(inputs[0], present, gram)
        values.append(value)
        return keras.ops.reshape(value, (1,))

    # The state changes in the scope alone, and then for good.
    with keras.StatelessScope():
        gradient = jacobian(total, [losses.value])[0][0]
    total([losses.value])
    to_numpy = keras.ops.convert_to_numpy
    return float(to_numpy(values[-1])), to_numpy(gradient)


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


class TaskWeightingTest(TestCase):
    def check(self, weighting, i, loss, gradient):
        actual, d_losses = step(weighting, i)
        np.testing.assert_allclose(actual, loss, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            d_losses * PRESENT[i], gradient * PRESENT[i], rtol=1e-4, atol=1e-6
        )

    def test_static(self):
        weighting = made(models.StaticWeighting(decay=[1.0, 0.5, 2.0]))
        for epoch in range(2):
            factors = np.array([1.0, 0.5, 2.0]) ** epoch
            for i in range(6):
                self.check(weighting, i, np.sum(factors * LOSSES[i]), factors)
            weighting.end_epoch()

    def test_uncertainty(self):
        weighting = made(models.UncertaintyWeighting(0.3))
        self.assertLen(weighting.trainable_variables, 1)
        s = np.array([0.3, -0.5, 1.0])
        weighting.trainable_variables[0].assign(s)
        factors = np.array([1.0, 0.5, 1.0]) * np.exp(-s)
        for i in range(6):
            loss = np.sum(PRESENT[i] * (factors * LOSSES[i] + s / 2))
            self.check(weighting, i, loss, factors)

    @parameterized.parameters(None, 2)
    def test_dynamic_weight_average(self, update_steps):
        weighting = made(
            models.DynamicWeightAverage(1.5, update_steps=update_steps)
        )
        last = before = None
        for i in range(0, 6, 2):
            factors = np.ones(3)
            if before is not None:
                known = (before > 0) & (last >= 0)
                ratios = np.where(known, last / np.where(known, before, 1), 1)
                factors = 3 * softmax(ratios / 1.5)
            for j in (i, i + 1):
                self.check(weighting, j, np.sum(factors * LOSSES[j]), factors)
            if update_steps is None:
                weighting.end_epoch()
            counts = PRESENT[i : i + 2].sum(axis=0)
            sums = LOSSES[i : i + 2].sum(axis=0)
            means = np.where(counts > 0, sums / np.maximum(counts, 1), -1)
            before, last = last, means

    def test_random_loss_weighting(self):
        weighting = made(models.RandomLossWeighting(seed=1))
        seen = []
        for _ in range(200):
            loss, factors = step(weighting, 0)
            np.testing.assert_allclose(
                loss, np.sum(factors * LOSSES[0]), rtol=1e-5
            )
            np.testing.assert_allclose(factors.sum(), 3, rtol=1e-5)
            seen.append(factors)
        self.assertGreater(np.std(seen, axis=0).min(), 0.3)
        np.testing.assert_allclose(np.mean(seen, axis=0), 1, atol=0.2)

    def test_geometric_loss(self):
        weighting = made(models.GeometricLoss())
        for i in range(6):
            some = PRESENT[i] > 0
            if not some.any():
                self.check(weighting, i, 0.0, np.zeros(3))
                continue
            mean = np.prod(LOSSES[i][some]) ** (1 / some.sum())
            gradient = mean / np.where(some, LOSSES[i], 1) / some.sum()
            self.check(weighting, i, mean, gradient)

    def test_famo(self):
        weighting = made(models.FAMO(learning_rate=0.5, decay=0.1))
        xi, last = np.zeros(3), np.full(3, np.nan)
        for i in range(6):
            some = PRESENT[i] > 0
            logs = np.log(np.where(some, LOSSES[i], 1))
            both = some & ~np.isnan(last)
            if both.any():
                change = np.where(both, np.nan_to_num(last) - logs, 0)
                z = softmax(xi)
                slope = (np.diag(z) - np.outer(z, z)) @ change
                xi = xi - 0.5 * (slope + 0.1 * xi)
            last = np.where(some, logs, last)
            z = softmax(xi) * some
            scale = np.sum(z / np.where(some, LOSSES[i], 1)) or 1.0
            gradient = z / np.where(some, LOSSES[i], 1) / scale
            self.check(weighting, i, np.sum(z * logs) / scale, gradient)
        self.assertGreater(np.ptp(xi), 0.05)

    def test_grad_norm(self):
        weighting = made(models.GradNorm(alpha=1.5, learning_rate=0.1))
        rng = np.random.default_rng(1)
        factors, first = np.ones(3), np.full(3, np.nan)
        for i in range(6):
            rows = rng.normal(size=(3, 7)) * PRESENT[i][:, None]
            gram = (rows @ rows.T).astype("float32")
            loss, gradient = step(weighting, i, gram)
            np.testing.assert_allclose(
                loss, np.sum(factors * LOSSES[i]), rtol=1e-4
            )
            np.testing.assert_allclose(gradient, factors, rtol=1e-4)
            some = PRESENT[i] > 0
            first = np.where(np.isnan(first) & some, LOSSES[i], first)
            norms = np.linalg.norm(rows, axis=1)
            if some.any():
                mean_norm = (factors * norms)[some].mean()
                rates = np.where(some, LOSSES[i] / first, 0)
                rates = rates / rates[some].mean()
                signs = np.sign(factors * norms - mean_norm * rates**1.5)
                moved = np.maximum(factors - 0.1 * norms * signs, 1e-3)[some]
                # Tasks without labels keep their weight.
                factors[some] = moved * factors[some].sum() / moved.sum()
        self.assertGreater(np.ptp(factors), 0.1)

    def test_grad_norm_selects_what_is_shared(self):
        # Of tasks whose names are those of other layers.
        x = keras.Input((2,), name="x")
        trunk = keras.layers.Dense(3, name="bottom_0")(x)
        tower = keras.layers.Dense(2, name="top_tower_0")(trunk)
        outputs = {
            "bottom": keras.layers.Dense(1, name="bottom_logits")(trunk),
            "top": keras.layers.Dense(1, name="top_logits")(tower),
        }
        model = models.MultiTaskModel({"x": x}, outputs, list(outputs))
        weighting = models.GradNorm()
        model.compile("sgd", task_weighting=weighting)
        variables = model.trainable_variables
        shared = [v for v in variables if id(v) in model._shared_ids]
        self.assertEqual(
            [v.path for v in weighting.select(variables, shared)],
            ["bottom_0/kernel", "bottom_0/bias"],
        )
        with self.assertRaisesRegex(ValueError, "more than one task uses"):
            weighting.select(variables, [])
        for heads in ("esmm", "aitm"):
            spaced = models.TaskSpec("buy", sample_space="click")
            model = models.MMoE(
                ["click", spaced] if heads == "esmm" else ["click", "buy"],
                layers.FeatureEmbedding([layers.Embedded("x", 2)]),
                heads=heads,
            )
            model.compile("sgd", task_weighting="gradnorm")
            names = {
                layer.name
                for layer in model.layers
                for v in layer.variables
                if id(v) in model._shared_ids
            }
            self.assertIn("experts", names)
            self.assertFalse({n for n in names if "buy_" in n or "click_" in n})
        # All that a single task has is compared with nothing.
        model = models.MultiTaskModel(
            {"x": x}, {"top": outputs["top"]}, ["top"]
        )
        model.compile("sgd", task_weighting=models.GradNorm())
        self.assertLen(model._shared_ids, 6)

    def test_pc_grad(self):
        rng = np.random.default_rng(0)
        for trial in range(10):
            rows = rng.normal(size=(4, 3))
            if trial == 0:
                rows[2] = 0.0  # A task without labels.
            orders = np.stack([rng.permutation(4) for _ in range(4)])
            total = np.zeros(3)
            for i in range(4):
                p = rows[i].copy()
                for j in orders[i]:
                    if i != j and p @ rows[j] < 0:
                        p -= p @ rows[j] / (rows[j] @ rows[j]) * rows[j]
                total += p
            weights = projected_weights(
                keras.ops.convert_to_tensor(rows @ rows.T, "float32"),
                keras.ops.convert_to_tensor(orders, "int32"),
            )
            np.testing.assert_allclose(
                keras.ops.convert_to_numpy(weights) @ rows, total, atol=1e-4
            )

    def test_pc_grad_orders_differ(self):
        rows = np.array([[1, 0], [-1, 0.2], [-0.9, -0.3]], "float32")
        weighting = made(models.PCGrad(seed=0))
        seen = {
            tuple(np.round(step(weighting, 0, rows @ rows.T)[1], 4))
            for _ in range(30)
        }
        expected = set()
        orders = list(itertools.permutations(range(3)))
        for chosen in itertools.product(orders, repeat=3):
            weights = projected_weights(
                keras.ops.convert_to_tensor(rows @ rows.T), np.array(chosen)
            )
            weights = keras.ops.convert_to_numpy(weights)
            expected.add(tuple(np.round(weights, 4)))
            if len(expected) == 8:
                break
        self.assertGreater(len(seen), 1)

    @parameterized.parameters(
        "static", "uncertainty", "dwa", "rlw", "gls", "famo", "gradnorm"
    )
    def test_config_and_weights(self, name):
        weighting = named.get(name)
        config = keras.saving.serialize_keras_object(weighting)
        again = named.get(config)
        self.assertIs(type(again), type(weighting))
        self.assertEqual(again.get_config(), weighting.get_config())
        self.assertEqual(tuple(made(again).task_weights().shape), (3,))
        with self.assertRaisesRegex(ValueError, "made for 3 tasks"):
            again.set_tasks(TASKS[:2])

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "`task_weighting` must be one"):
            named.get("even")
        with self.assertRaisesRegex(ValueError, "3, one a task"):
            made(models.StaticWeighting(decay=[1.0, 0.5]))
        with self.assertRaisesRegex(NotImplementedError, "must define"):
            made(models.TaskWeighting()).combine(None, None)
        for make in (
            lambda: models.StaticWeighting(decay=0.0),
            lambda: models.UncertaintyWeighting(np.nan),
            lambda: models.DynamicWeightAverage(temperature=0),
            lambda: models.DynamicWeightAverage(update_steps=0),
            lambda: models.GeometricLoss(epsilon=0.0),
            lambda: models.FAMO(learning_rate=-1.0),
            lambda: models.FAMO(decay=-1.0),
            lambda: models.GradNorm(alpha=-1.0),
            lambda: models.GradNorm(learning_rate=0),
        ):
            with self.assertRaisesRegex(ValueError, "Received"):
                make()
