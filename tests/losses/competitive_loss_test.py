import keras
import numpy as np
from keras import ops

from keras_moe.losses import CompetitiveLoss
from tests import token_loop
from tests.losses.gradients import value_and_gradient
from tests.test_case import TestCase


def loop(y_true, outputs, log_probs, variance):
    values = []
    for d, o, z in zip(y_true, outputs, log_probs, strict=True):
        total = sum(
            np.exp(z[e] - np.sum((d - o[e]) ** 2) / (2 * variance))
            for e in range(len(z))
        )
        values.append(-np.log(total))
    return np.mean(values)


class CompetitiveLossTest(TestCase):
    def test_against_loop(self):
        rng = np.random.default_rng(0)
        y_true = rng.normal(size=(4, 2))
        y_pred = rng.normal(size=(4, 3, 3))
        loss = CompetitiveLoss(variance=0.7)

        def expected(parts):
            y = parts["y_pred"]
            return loop(y_true, y[..., :2], y[..., 2], 0.7)

        value, gradient = value_and_gradient(
            lambda y_pred: loss(ops.array(y_true, "float32"), y_pred), y_pred
        )
        parts = {"y_pred": y_pred}
        self.assertAllClose(value, expected(parts), rtol=1e-5)
        wanted = token_loop.gradients(expected, parts)["y_pred"]
        self.assertAllClose(gradient, wanted, rtol=1e-4, atol=1e-5)

    def test_hand_computed(self):
        # One expert hits, the other is sqrt(2) away: -log(0.75 + 0.25 / e).
        y_pred = [[[1.0, 2.0, np.log(0.75)], [2.0, 3.0, np.log(0.25)]]]
        value = CompetitiveLoss()(ops.array([[1.0, 2.0]]), ops.array(y_pred))
        self.assertAllClose(value, -np.log(0.75 + 0.25 / np.e), rtol=1e-5)
        both = [[[1.0, 2.0, np.log(0.75)], [1.0, 2.0, np.log(0.25)]]]
        value = CompetitiveLoss()(ops.array([[1.0, 2.0]]), ops.array(both))
        self.assertAllClose(value, 0.0, atol=1e-6)

    def test_impossible_and_far_experts(self):
        inf = np.inf
        for log_probs, offset in (
            ((0.0, -inf), 0.0),
            ((-inf, -inf), 0.0),
            ((0.0, 0.0), 1e4),  # exp(-1e8) underflows
        ):
            y_pred = np.zeros((1, 2, 2))
            y_pred[0, :, 0] = offset
            y_pred[0, :, 1] = log_probs
            value, gradient = value_and_gradient(
                lambda y_pred: CompetitiveLoss()(ops.zeros((1, 1)), y_pred),
                y_pred,
            )
            self.assertTrue(np.isfinite(value))
            self.assertTrue(np.isfinite(gradient).all())
        zero = CompetitiveLoss()(
            ops.zeros((1, 1)), ops.array([[[0.0, 0.0], [9.0, -inf]]])
        )
        self.assertEqual(float(zero), 0.0)

    def test_two_experts_share_the_work(self):
        # y is x or -x, by the sign of another input: one line each.
        rng = np.random.default_rng(0)
        x = rng.uniform(-1, 1, (256, 2)).astype("float32")
        y = np.where(x[:, 1:] > 0, 3 * x[:, :1], -3 * x[:, :1])
        inputs = keras.Input((2,))
        outputs = [keras.layers.Dense(1)(inputs) for _ in range(2)]
        gate = keras.layers.Dense(2, name="gate")(inputs)
        log_probs = ops.expand_dims(ops.log_softmax(gate), -1)
        prediction = ops.concatenate(
            [ops.stack(outputs, axis=1), log_probs], axis=-1
        )
        model = keras.Model(inputs, prediction)
        model.compile(
            keras.optimizers.Adam(0.1), CompetitiveLoss(variance=0.05)
        )
        history = model.fit(x, y, batch_size=64, epochs=15, verbose=0)
        self.assertTrue(np.isfinite(history.history["loss"]).all())
        predicted = model.predict(x, verbose=0)
        expert = predicted[..., -1].argmax(axis=1)
        # The gate has found the sign, and each expert its line.
        share = np.mean(expert == (x[:, 1] > 0))
        self.assertGreater(max(share, 1 - share), 0.9)
        chosen = predicted[np.arange(256), expert, :1]
        self.assertLess(np.mean((chosen - y) ** 2), 0.1 * np.var(y))

    def test_float16_and_config(self):
        rng = np.random.default_rng(0)
        y_true, y_pred = rng.normal(size=(4, 2)), rng.normal(size=(4, 3, 3))
        half = CompetitiveLoss(dtype="float16")(y_true, y_pred)
        self.assertAllClose(half, CompetitiveLoss()(y_true, y_pred), rtol=1e-2)
        loss = CompetitiveLoss(variance=2.0, reduction="sum", name="own")
        config = keras.losses.serialize(loss)
        again = keras.losses.deserialize(config)
        self.assertIsInstance(again, CompetitiveLoss)
        self.assertEqual(again.get_config(), loss.get_config())
        self.assertEqual(again.variance, 2.0)

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "variance=0"):
            CompetitiveLoss(variance=0)
        for true, pred in (
            ((4, 2), (4, 3, 2)),
            ((4, 2), (4, 3)),
            ((4,), (4, 2, 2)),
        ):
            with self.assertRaisesRegex(ValueError, "dim \\+ 1.*y_true.shape="):
                CompetitiveLoss()(ops.ones(true), ops.ones(pred))
