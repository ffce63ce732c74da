import numpy as np
from keras import ops

from keras_moe.routers.entmax_router import EntmaxRouter
from tests.ops.entmax_test import entmax_by_bisection
from tests.routers.variable_k_checks import LoopChecks
from tests.routers.variable_k_checks import VariableKChecks
from tests.test_case import TestCase


class Parts:
    alpha = 1.5
    max_experts = None

    def make(self, num_experts, **kwargs):
        options = {
            "alpha": self.alpha,
            "max_experts": self.max_experts and min(2, num_experts),
            "use_bias": True,
            "kernel_initializer": "glorot_normal",
            "bias_initializer": "glorot_normal",
            **kwargs,
        }
        if options["max_experts"] == 1:
            options.setdefault("normalize_weights", False)
        return EntmaxRouter(num_experts, **options)

    def loop(self, tokens, weights):
        combine = np.zeros((len(tokens), 5))
        for t, token in enumerate(tokens):
            logits = token @ weights["kernel"] + weights["bias"]
            p = entmax_by_bisection(logits, self.alpha)
            if self.max_experts is not None:
                p[np.argsort(-p)[self.max_experts :]] = 0
                p /= p.sum()
            combine[t] = p
        return combine


class EntmaxRouterTest(Parts, VariableKChecks, TestCase):
    pass


class GeneralAlphaTest(Parts, LoopChecks, TestCase):
    alpha = 1.3


class MaxExpertsTest(Parts, LoopChecks, TestCase):
    alpha = 1.2
    max_experts = 2

    def test_weights_not_normalized(self):
        router = self.make(5, normalize_weights=False)
        routing = router(self.tokens())
        weights = ops.convert_to_numpy(routing.expert_weights)
        probs = np.sort(ops.convert_to_numpy(routing.probs), axis=-1)
        self.assertAllClose(weights, probs[:, :-3:-1])
        self.assertLess(weights.sum(axis=-1).min(), 0.95)


class EntmaxRouterArgumentsTest(TestCase):
    def test_by_hand(self):
        router = EntmaxRouter(
            3, alpha=2.0, temperature=0.5, kernel_initializer="identity"
        )
        # Logits / 0.5: (1, 0.5, -9) keeps two, (5, 0, 0) one, and of three
        # equal ones the lower index comes first.
        routing = router(
            np.array([[0.5, 0.25, -4.5], [2.5, 0, 0], [0, 0, 0]], "float32")
        )
        self.assertAllEqual(
            routing.expert_indices, [[0, 1, 3], [0, 3, 3], [0, 1, 2]]
        )
        self.assertAllClose(
            routing.expert_weights,
            [[0.75, 0.25, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]],
        )

    def test_best_ones_of_equal_ones(self):
        router = EntmaxRouter(5, max_experts=3, kernel_initializer="zeros")
        routing = router(np.ones((1, 2), "float32"))
        self.assertAllEqual(routing.expert_indices, [[0, 1, 2]])
        self.assertAllClose(routing.expert_weights, [[1 / 3, 1 / 3, 1 / 3]])

    def test_normalize_weights_by_default(self):
        self.assertTrue(EntmaxRouter(4).normalize_weights)
        self.assertTrue(EntmaxRouter(4, max_experts=2).normalize_weights)
        self.assertFalse(EntmaxRouter(4, max_experts=1).normalize_weights)

    def test_errors(self):
        for message, kwargs in (
            (r"`alpha` must be above 1 .* alpha=1$", {"alpha": 1}),
            (r"`alpha` must be above 1 .* alpha=inf", {"alpha": np.inf}),
            (
                r"`max_experts` must be .* max_experts=5, num_experts=4",
                {"max_experts": 5},
            ),
            (r"`max_experts` must be .* max_experts=0", {"max_experts": 0}),
            (r"`max_experts` must be .*=True", {"max_experts": True}),
            (
                "would get no gradient. Received: normalize_weights=True",
                {"max_experts": 1, "normalize_weights": True},
            ),
        ):
            with self.assertRaisesRegex(ValueError, message):
                EntmaxRouter(4, **kwargs)
