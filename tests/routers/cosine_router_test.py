import math

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.routers import NoisyRouting
from keras_moe.routers import Routing
from keras_moe.routers.cosine_router import CosineRouter
from tests import token_loop
from tests.routers.logits_checks import DIM
from tests.routers.logits_checks import LogitsChecks
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase


def best(scores, k):
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:k]


class CosineRouterTest(LogitsChecks, TestCase):
    def make(self, **kwargs):
        return CosineRouter(4, **{"projection_dim": 3, **kwargs})

    def loop(self, token, context, weights):
        low = token @ weights["projection_kernel"]
        low = low + weights.get("projection_bias", 0.0)
        scale = np.exp(weights["log_scale"])
        logits = np.zeros(4)
        for e in range(4):
            v = weights["kernel"][:, e]
            logits[e] = low @ v / np.sqrt(low @ low) / np.sqrt(v @ v)
        logits = scale * logits
        probs = token_loop.softmax(logits)
        chosen = best(logits, 2)
        total = sum(probs[e] for e in chosen)
        return logits, probs, {e: probs[e] / total for e in chosen}

    def test_against_loop(self):
        self.check_against_loop()
        self.check_against_loop(use_projection_bias=False)

    def test_scale(self):
        router = self.make(initial_temperature=0.25, max_scale=10.0)
        logits = router(self.tokens()).logits
        self.assertAllClose(router.log_scale, np.log(4.0))
        self.assertLess(np.abs(ops.convert_to_numpy(logits)).max(), 4.0001)
        before = ops.convert_to_numpy(logits) / 4
        router.log_scale.assign(5.0)
        self.assert_relative(router(self.tokens()).logits, 10 * before)
        # The length of what is compared does not count.
        router.kernel.assign(100 * router.kernel)
        self.assert_relative(router(self.tokens()).logits, 10 * before)

    def test_no_direction(self):
        router = self.built()
        router.projection_kernel.assign(np.zeros((DIM, 3)))
        router.projection_bias.assign(np.zeros(3))
        self.assertAllClose(router(self.tokens()).logits, np.zeros((9, 4)))

    def test_load(self):
        """As V-MoE's router counts it, from these logits and draws."""
        router = self.built(noise_stddev=0.5)
        self.assertIs(router.routing_class, NoisyRouting)
        draws = np.random.default_rng(5).normal(size=(9, 4)).astype("float32")
        with recorded_draws(normal=[draws]):
            routing = router(self.tokens(), training=True)
        logits = ops.convert_to_numpy(routing.logits)
        noisy = logits + 0.5 * draws
        threshold = np.sort(noisy, 1)[:, -2][:, None]
        margin = (logits - threshold) / 0.5 / np.sqrt(2)
        self.assert_relative(
            routing.load, 0.5 * (1 + np.vectorize(math.erf)(margin))
        )
        self.assertAllEqual(
            routing.expert_indices, np.argsort(-noisy, 1)[:, :2]
        )
        routing = router(self.tokens())
        chosen = np.zeros((9, 4))
        np.put_along_axis(
            chosen, ops.convert_to_numpy(routing.expert_indices), 1.0, axis=1
        )
        self.assertAllEqual(routing.load, chosen)
        for options in ({"gumbel_noise": 1.0}, {"expert_bias": True}, {}):
            noise = 0.5 if options else 0.0
            router = self.built(noise_stddev=noise, **options)
            routing = router(self.tokens(), training=True)
            self.assertIs(type(routing), Routing)

    @parameterized.parameters(
        ({"projection_dim": 0}, "projection_dim=0"),
        ({"initial_temperature": 0.0}, "initial_temperature=0.0"),
        ({"max_scale": -1.0}, "max_scale=-1.0"),
        ({"top_k": 5}, "top_k=5, num_experts=4"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            self.make(**kwargs)
