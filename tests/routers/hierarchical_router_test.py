import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.routers.hierarchical_router import HierarchicalRouter
from tests import token_loop
from tests.routers.logits_checks import DIM
from tests.routers.logits_checks import TOKENS
from tests.routers.logits_checks import LogitsChecks
from tests.routers.logits_checks import as_arrays
from tests.test_case import TestCase


def best(scores, k):
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:k]


class HierarchicalRouterTest(LogitsChecks, TestCase):
    def make(self, **kwargs):
        self.options = {
            "top_k_groups": 2,
            "top_k": 2,
            "normalize_group_weights": True,
            "normalize_weights": True,
            **kwargs,
        }
        return HierarchicalRouter(3, 4, **self.options)

    def loop(self, token, context, weights):
        group_logits = token @ weights["group_kernel"]
        inner_logits = (token @ weights["inner_kernel"]).reshape(3, 4)
        group_probs = token_loop.softmax(group_logits)
        logits, probs, chosen = np.zeros(12), np.zeros(12), {}
        for i in range(3):
            inner = token_loop.softmax(inner_logits[i])
            for j in range(4):
                logits[4 * i + j] = group_logits[i] + np.log(inner[j])
                probs[4 * i + j] = group_probs[i] * inner[j]
        groups = best(group_logits, self.options["top_k_groups"])
        group_total = sum(group_probs[i] for i in groups)
        if not self.options["normalize_group_weights"]:
            group_total = 1.0
        for i in groups:
            inner = token_loop.softmax(inner_logits[i])
            experts = best(inner, self.options["top_k"])
            total = sum(inner[j] for j in experts)
            if not self.options["normalize_weights"]:
                total = 1.0
            for j in experts:
                chosen[4 * i + j] = (
                    group_probs[i] / group_total * inner[j] / total
                )
        return (
            logits,
            probs,
            dict(sorted(chosen.items(), key=lambda item: -item[1])),
        )

    @parameterized.parameters(
        {},
        {"normalize_group_weights": False, "normalize_weights": False},
        {"top_k_groups": 1, "top_k": 3, "normalize_group_weights": False},
        {"top_k_groups": 3, "top_k": 1, "normalize_weights": False},
    )
    def test_against_loop(self, **kwargs):
        self.check_against_loop(**kwargs)

    def test_defaults(self):
        router = HierarchicalRouter(3, 4)
        self.assertTrue(router.normalize_group_weights)
        self.assertTrue(router.normalize_weights)
        router = HierarchicalRouter(3, 4, 1, 1)
        self.assertFalse(router.normalize_group_weights)
        self.assertFalse(router.normalize_weights)

    def test_softmax_of_the_logits(self):
        routing = self.built()(self.tokens())
        logits = ops.convert_to_numpy(routing.logits).astype("float64")
        self.assertAllClose(
            routing.probs, [token_loop.softmax(row) for row in logits]
        )
        self.assertAllClose(ops.sum(routing.probs, axis=-1), np.ones(TOKENS))

    def test_moe_is_a_mixture_of_mixtures(self):
        layer = MoE(
            router=self.built(),
            experts=MLPExperts(
                12, 4, activation="tanh", kernel_initializer="normal"
            ),
            losses=None,
        )
        tokens = self.tokens()
        outputs = ops.convert_to_numpy(layer(tokens))
        w = as_arrays(layer.router)
        inner_kernel = w["inner_kernel"].reshape(DIM, 3, 4)
        experts = {
            f"experts/{k}": v for k, v in as_arrays(layer.experts).items()
        }
        expected = np.zeros(tokens.shape)
        for t, token in enumerate(tokens.astype("float64")):
            gates = token @ w["group_kernel"]
            groups = best(gates, 2)
            gates = token_loop.softmax(gates[groups])
            for gate, i in zip(gates, groups, strict=True):
                inner = token @ inner_kernel[:, i]
                chosen = best(inner, 2)
                inner = token_loop.softmax(inner[chosen])
                mixture = sum(
                    share * token_loop.expert(token, experts, 4 * i + j, "tanh")
                    for share, j in zip(inner, chosen, strict=True)
                )
                expected[t] += gate * mixture
        scale = np.abs(expected).max()
        self.assertGreater(scale, 0)
        self.assert_relative(outputs / scale, expected / scale)

    def test_noise(self):
        router = self.built(noise_stddev=1.0)
        tokens = self.tokens()
        first, second = (router(tokens, training=True) for _ in range(2))
        self.assertAllEqual(first.logits, second.logits)
        difference = ops.convert_to_numpy(first.probs - second.probs)
        self.assertGreater(np.abs(difference).max(), 1e-2)
        self.assertAllEqual(router(tokens).probs, self.built()(tokens).probs)
        self.assertFalse(hasattr(self.make(), "seed_generator"))

    def test_no_more_groups_than_one(self):
        router = HierarchicalRouter(1, 4, 1, 4)
        routing = router(self.tokens())
        self.assertAllClose(
            ops.sum(routing.expert_weights, axis=-1), np.ones(TOKENS)
        )

    @parameterized.parameters(
        ({"num_groups": 0}, "num_groups=0"),
        ({"experts_per_group": 0}, "experts_per_group=0"),
        ({"top_k_groups": 4}, "top_k_groups=4, num_groups=3"),
        ({"top_k": 5}, "top_k=5, experts_per_group=4"),
        ({"top_k": 1, "normalize_weights": True}, "normalize_weights=True"),
        (
            {"top_k_groups": 1, "normalize_group_weights": True},
            "normalize_group_weights=True",
        ),
        ({"noise_stddev": -1.0}, "noise_stddev=-1.0"),
        ({"use_bias": True}, "use_bias=True"),
    )
    def test_errors(self, kwargs, message):
        kwargs = {"num_groups": 3, "experts_per_group": 4, **kwargs}
        with self.assertRaisesRegex(ValueError, message):
            HierarchicalRouter(**kwargs)
