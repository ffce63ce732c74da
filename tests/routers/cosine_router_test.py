import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.routers.cosine_router import CosineRouter
from tests import token_loop
from tests.routers.logits_checks import DIM
from tests.routers.logits_checks import LogitsChecks
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

    @parameterized.parameters(
        ({"projection_dim": 0}, "projection_dim=0"),
        ({"initial_temperature": 0.0}, "initial_temperature=0.0"),
        ({"max_scale": -1.0}, "max_scale=-1.0"),
        ({"top_k": 5}, "top_k=5, num_experts=4"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            self.make(**kwargs)
