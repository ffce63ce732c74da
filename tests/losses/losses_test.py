import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from keras_moe.routers import Routing
from tests import token_loop
from tests.test_case import TestCase


def random_routing(num_tokens, num_experts, top_k, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_tokens, num_experts))
    weights = {"router/kernel": np.eye(num_experts)}
    _, probs, indices, kept = token_loop.route(logits, weights, top_k)
    arrays = logits, probs, indices
    return arrays, Routing(
        ops.array(logits.astype(dtype)),
        ops.array(probs.astype(dtype)),
        ops.array(indices.astype("int32")),
        ops.array(kept.astype("float32")),
    )


def balanced_routing(num_experts, top_k):
    """Token t goes to experts t, t + 1, ...: each gets `top_k` tokens."""
    indices = (np.arange(num_experts)[:, None] + np.arange(top_k)) % num_experts
    uniform = np.full((num_experts, num_experts), 1 / num_experts, "float32")
    return Routing(
        ops.zeros((num_experts, num_experts)),
        ops.array(uniform),
        ops.array(indices.astype("int32")),
        ops.ones((num_experts, top_k)),
    )


class LossesTest(TestCase):
    def both(self, routing, mask=None):
        return [
            float(loss(weight=1.0)(routing, mask))
            for loss in (losses.LoadBalancingLoss, losses.RouterZLoss)
        ]

    @parameterized.product(top_k=(1, 2, 4), masked=(False, True))
    def test_against_token_loop(self, top_k, masked):
        (logits, probs, indices), routing = random_routing(17, 4, top_k)
        mask = np.arange(17) % 3 > 0 if masked else None
        self.assertAllClose(
            self.both(routing, None if mask is None else ops.array(mask)),
            [
                token_loop.load_balancing_loss(probs, indices, mask),
                token_loop.router_z_loss(logits, mask),
            ],
            rtol=1e-5,
        )

    def test_values_at_balance_and_collapse(self):
        for top_k in (1, 2, 5):
            balance, z = self.both(balanced_routing(5, top_k))
            self.assertAllClose(balance, 1.0)
            self.assertAllClose(z, np.log(5) ** 2)
        # All tokens to expert 0 of 5, surely: f = P = (1, 0, 0, 0, 0).
        probs = ops.one_hot(ops.zeros((7,), "int32"), 5)
        routing = Routing(
            probs, probs, ops.zeros((7, 1), "int32"), ops.ones((7, 1))
        )
        self.assertAllClose(self.both(routing)[0], 5.0)

    def test_sigmoid_scores_are_normalized(self):
        routing = balanced_routing(4, 2)
        routing = routing._replace(probs=0.3 * ops.ones_like(routing.probs))
        self.assertAllClose(self.both(routing)[0], 1.0)

    def test_degenerate_batches_are_finite(self):
        for num_tokens, num_experts, top_k in ((1, 4, 2), (0, 4, 2), (3, 1, 1)):
            _, routing = random_routing(num_tokens, num_experts, top_k)
            for mask in (None, ops.zeros((num_tokens,), "bool")):
                values = self.both(routing, mask)
                self.assertTrue(np.isfinite(values).all())
                if num_tokens == 0 or mask is not None:
                    self.assertEqual(values, [0.0, 0.0])

    def test_masked_nan_does_not_count(self):
        _, routing = random_routing(6, 4, 2)
        mask = np.arange(6) != 2
        clean = self.both(routing, ops.array(mask))
        nan = np.where(mask[:, None], 0.0, np.nan).astype("float32")
        routing = routing._replace(
            logits=routing.logits + nan, probs=routing.probs + nan
        )
        self.assertAllClose(self.both(routing, ops.array(mask)), clean)

    def test_float16_routing_of_a_users_router(self):
        _, routing = random_routing(6000, 4, 2, dtype="float16")
        for loss in losses.get("default"):
            value = loss(routing)
            self.assertEqual(
                keras.backend.standardize_dtype(value.dtype), "float32"
            )
            self.assertTrue(np.isfinite(float(value)))

    def test_get(self):
        default = losses.get("default")
        self.assertEqual([loss.weight for loss in default], [0.01, 0.001])
        self.assertEqual(losses.get(None), [])
        own = lambda routing, mask: 0.0
        z = losses.RouterZLoss(weight=3.0)
        nested = losses.get(["load_balancing", own, [z]])
        self.assertIsInstance(nested[0], losses.LoadBalancingLoss)
        self.assertEqual(nested[1:], [own, z])
        config = keras.saving.serialize_keras_object(z)
        self.assertEqual(losses.get(config)[0].weight, 3.0)

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "weight=-1"):
            losses.RouterZLoss(weight=-1)
        with self.assertRaisesRegex(ValueError, "'balance'"):
            losses.get("balance")
        with self.assertRaisesRegex(ValueError, "17"):
            losses.get([17])
        with self.assertRaisesRegex(NotImplementedError, "call"):
            losses.RoutingLoss(1.0)(balanced_routing(2, 1))
