import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.routers.sinkhorn_router import SinkhornRouter
from tests import token_loop
from tests.ops.sinkhorn_test import by_loop
from tests.routers.linear_mixture import LinearMixture
from tests.routers.linear_mixture import RouterChecks
from tests.routers.linear_mixture import Sequences
from tests.routers.linear_mixture import numpy_mixture
from tests.routers.linear_mixture import router_gradient
from tests.routers.linear_mixture import to_numpy
from tests.test_case import TestCase

MASK = np.array([True] * 7 + [False] + [True] * 4)


def route(tokens, kernel, top_k, groups, iterations, mask):
    """`(logits, probs, indices, weights)`; without iterations: inference."""
    logits = tokens @ kernel
    num_experts = kernel.shape[1]
    if top_k == 1:
        probs = token_loop.sigmoid(logits)
    else:
        probs = np.array([token_loop.softmax(z) for z in logits])
    ranked = logits
    if iterations:
        size = len(tokens) // groups
        ranked = np.concatenate(
            [
                by_loop(logits[i : i + size], iterations, mask[i : i + size])
                for i in range(0, len(tokens), size)
            ]
        )
    indices = np.full((len(tokens), top_k), num_experts)
    weights = np.zeros((len(tokens), top_k))
    for t in np.flatnonzero(mask):
        order = sorted(range(num_experts), key=lambda e: -ranked[t, e])
        indices[t] = order[:top_k]
        weights[t] = probs[t, indices[t]]
    return logits, probs, indices, weights


class SinkhornRouterTest(RouterChecks, TestCase):
    def make(self, **kwargs):
        initializer = keras.initializers.RandomNormal(stddev=1.0, seed=1)
        kwargs = {"kernel_initializer": initializer, **kwargs}
        return SinkhornRouter(4, **{"num_iterations": 5, **kwargs})

    @parameterized.named_parameters(
        ("training", True, 1, "batch", 1),
        ("inference", False, 1, "batch", 1),
        ("top_2", True, 2, "sequence", 3),
        ("top_2_inference", False, 2, "sequence", 3),
        ("two_sequences", True, 1, 2, 3),
    )
    def test_against_loop(self, training, top_k, per, groups):
        router = self.make(top_k=top_k, per=per)
        num_sequences = 6 if per == 2 else groups
        routing = router(
            self.tokens(),
            mask=MASK,
            training=training,
            num_sequences=num_sequences,
        )
        kernel = ops.convert_to_numpy(router.kernel).astype(float)
        tokens = np.where(MASK[:, None], self.tokens(), 0.0).astype(float)
        expected = route(
            tokens, kernel, top_k, groups, 5 if training else 0, MASK
        )
        for actual, value in zip(to_numpy(routing), expected, strict=True):
            self.assert_relative(actual, value)

    def test_balances(self):
        rng = np.random.default_rng(0)
        tokens = rng.normal(size=(400, 6)).astype("float32")
        tokens[:, 0] += 2.0  # an expert that most tokens prefer
        router = self.make(num_iterations=20)
        loads = [
            np.bincount(
                to_numpy(router(tokens, training=t)).expert_indices[:, 0],
                minlength=4,
            )
            for t in (True, False)
        ]
        self.assertLess(np.ptp(loads[0]), np.ptp(loads[1]) / 2)

    @parameterized.parameters(1, 2)
    def test_gradients_against_loop(self, top_k):
        rng = np.random.default_rng(2)
        router = self.make(top_k=top_k)
        weights = rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 3))
        layer = LinearMixture(router, *weights)
        cotangent = rng.normal(size=(12, 3))
        layer(self.tokens(), mask=MASK)
        y, dx, dw = self.outputs_and_gradients(
            layer, self.tokens(), cotangent, mask=MASK, training=True
        )
        arrays = {
            "x": self.tokens(),
            "router": ops.convert_to_numpy(router.kernel),
        }
        tokens = np.where(MASK[:, None], self.tokens(), 0.0).astype(float)
        chosen = route(
            tokens, arrays["router"].astype(float), top_k, 1, 5, MASK
        )
        chosen = (chosen[2][..., None] == np.arange(4)).any(1)

        def mixture(a):
            probs = route(a["x"], a["router"], top_k, 1, 0, MASK)[1]
            return numpy_mixture(chosen * probs, a["x"], *weights)

        expected = token_loop.gradients(
            lambda a: (mixture(a) * cotangent).sum(), arrays
        )
        self.assert_relative(y, mixture(arrays))
        self.assert_relative(dx, expected["x"], 1e-4)
        self.assert_relative(router_gradient(dw), expected["router"], 1e-4)

    def test_unknown_batch_size(self):
        router = self.make(per="sequence", top_k=2)
        layer = Sequences(router)
        inputs = keras.Input((4, 6))
        model = keras.Model(inputs, layer(inputs, training=True))
        self.assertEqual(model.output_shape, (None, 4, 4))
        x = self.tokens().reshape(3, 4, 6)
        expected = layer(x, training=True)
        self.assertAllClose(model(x), expected)
        # `predict` overrides `training`.
        self.assertAllClose(model.predict(x, verbose=0), layer(x))

    def test_config(self):
        self.assertTrue(SinkhornRouter.looks_ahead)
        router = self.make(
            top_k=2, num_iterations=3, per=2, score_activation="sigmoid"
        )
        self.run_class_serialization_test(router)
        self.assertEqual(self.make().score_activation, "sigmoid")
        self.assertEqual(self.make(top_k=2).score_activation, "softmax")

    @parameterized.parameters(
        ({"top_k": 5}, "top_k=5, num_experts=4"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"per": 0}, "per=0"),
        ({"score_activation": "relu"}, "score_activation='relu'"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            SinkhornRouter(4, **kwargs)
