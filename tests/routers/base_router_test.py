import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.routers.base_router import BASERouter
from tests import token_loop
from tests.ops.balanced_assignment_test import best_total
from tests.routers.linear_mixture import LinearMixture
from tests.routers.linear_mixture import RouterChecks
from tests.routers.linear_mixture import Sequences
from tests.routers.linear_mixture import numpy_mixture
from tests.routers.linear_mixture import router_gradient
from tests.routers.linear_mixture import to_numpy
from tests.test_case import TestCase

MASK = np.array([True] * 7 + [False] + [True] * 4)


class BASERouterTest(RouterChecks, TestCase):
    def make(self, **kwargs):
        initializer = keras.initializers.RandomNormal(stddev=1.0, seed=1)
        return BASERouter(4, **{"kernel_initializer": initializer, **kwargs})

    @parameterized.named_parameters(
        ("batch", "batch", 2, 1),
        ("sequence", "sequence", 3, 3),
        ("two_sequences", 2, 6, 3),
    )
    def test_training(self, per, num_sequences, groups):
        router = self.make(per=per)
        routing = to_numpy(
            router(
                self.tokens(),
                mask=MASK,
                training=True,
                num_sequences=num_sequences,
            )
        )
        kernel = ops.convert_to_numpy(router.kernel).astype(float)
        tokens = np.where(MASK[:, None], self.tokens(), 0.0).astype(float)
        logits = tokens @ kernel
        self.assert_relative(routing.logits, logits)
        self.assert_relative(routing.probs, token_loop.sigmoid(logits))
        size = 12 // groups
        for i in range(0, 12, size):
            real = i + np.flatnonzero(MASK[i : i + size])
            chosen = routing.expert_indices[real, 0]
            loads = np.bincount(chosen, minlength=4)
            self.assertEqual(loads.max(), -(-len(real) // 4))
            self.assertEqual(loads.min(), len(real) // 4)
            total = logits[real, chosen].sum()
            self.assertAllClose(total, best_total(logits[real]), atol=1e-3)
            self.assert_relative(
                routing.expert_weights[real, 0],
                token_loop.sigmoid(logits[real, chosen]),
            )
        self.assertAllEqual(routing.expert_indices[~MASK], [[4]])
        self.assertAllEqual(routing.expert_weights[~MASK], [[0.0]])

    def test_inference_is_greedy(self):
        router = self.make()
        routing = to_numpy(router(self.tokens(), mask=MASK))
        for t in range(12):
            best = max(range(4), key=lambda e: routing.logits[t, e])
            weight = token_loop.sigmoid(routing.logits[t, best])
            expected = (best, weight) if MASK[t] else (4, 0.0)
            self.assertEqual(routing.expert_indices[t, 0], expected[0])
            self.assertAllClose(routing.expert_weights[t, 0], expected[1])

    def test_gradients_against_loop(self):
        rng = np.random.default_rng(2)
        router = self.make()
        weights = rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 3))
        layer = LinearMixture(router, *weights)
        cotangent = rng.normal(size=(12, 3))
        routing = router(self.tokens(), mask=MASK, training=True)
        layer(self.tokens(), mask=MASK)
        y, dx, dw = self.outputs_and_gradients(
            layer, self.tokens(), cotangent, mask=MASK, training=True
        )
        chosen = to_numpy(routing).expert_indices == np.arange(4)
        arrays = {
            "x": self.tokens(),
            "router": ops.convert_to_numpy(router.kernel),
        }

        def mixture(a):
            probs = token_loop.sigmoid(a["x"] @ a["router"])
            return numpy_mixture(chosen * probs, a["x"], *weights)

        expected = token_loop.gradients(
            lambda a: (mixture(a) * cotangent).sum(), arrays
        )
        self.assert_relative(y, mixture(arrays))
        self.assert_relative(dx, expected["x"], 1e-4)
        self.assert_relative(router_gradient(dw), expected["router"], 1e-4)

    def test_initial_centroids_are_orthogonal(self):
        router = BASERouter(4, seed=0)
        router.build((None, 6))
        kernel = ops.convert_to_numpy(router.kernel)
        self.assertAllClose(kernel.T @ kernel, 0.01 * np.eye(4), atol=1e-6)

    def test_unknown_batch_size(self):
        router = self.make(per="sequence")
        layer = Sequences(router)
        inputs = keras.Input((4, 6))
        model = keras.Model(inputs, layer(inputs, training=True))
        self.assertEqual(model.output_shape, (None, 4, 4))
        x = self.tokens().reshape(3, 4, 6)
        expected = ops.convert_to_numpy(layer(x, training=True))
        self.assertAllEqual(np.sum(expected > 0, 1), np.ones((3, 4)))
        self.assertAllClose(model(x), expected)
        # `predict` overrides `training`.
        self.assertAllClose(model.predict(x, verbose=0), layer(x))

    def test_config(self):
        self.assertTrue(BASERouter.looks_ahead)
        self.run_class_serialization_test(
            BASERouter(4, per=2, use_bias=True, jitter=0.1, seed=1)
        )

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "per=-1"):
            BASERouter(4, per=-1)
