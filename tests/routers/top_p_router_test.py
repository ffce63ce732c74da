import numpy as np
from keras import ops

from keras_moe.routers.top_p_router import TopPRouter
from tests import token_loop
from tests.routers.variable_k_checks import LoopChecks
from tests.routers.variable_k_checks import VariableKChecks
from tests.test_case import TestCase


class Parts:
    top_p = 0.5
    max_experts = None
    normalize_weights = False

    def make(self, num_experts, **kwargs):
        options = {
            "top_p": self.top_p,
            "max_experts": self.max_experts and min(2, num_experts),
            "normalize_weights": self.normalize_weights and num_experts > 1,
            "use_bias": True,
            "kernel_initializer": "glorot_normal",
            "bias_initializer": "glorot_normal",
            **kwargs,
        }
        return TopPRouter(num_experts, **options)

    def loop(self, tokens, weights):
        combine = np.zeros((len(tokens), 5))
        for t, token in enumerate(tokens):
            p = token_loop.softmax(token @ weights["kernel"] + weights["bias"])
            reached = 0.0
            for rank, e in enumerate(sorted(range(5), key=lambda e: -p[e])):
                if reached >= self.top_p or rank == self.max_experts:
                    break
                reached += p[e]
                combine[t, e] = p[e]
            if self.normalize_weights:
                combine[t] /= combine[t].sum()
        return combine


class TopPRouterTest(Parts, VariableKChecks, TestCase):
    pass


class MaxExpertsTest(Parts, LoopChecks, TestCase):
    top_p = 0.8
    max_experts = 2
    normalize_weights = True


class TopPRouterArgumentsTest(TestCase):
    def probs(self, *rows):
        return np.log(np.array(rows, "float32"))

    def choices(self, top_p, *rows, **kwargs):
        router = TopPRouter(
            len(rows[0]), top_p, kernel_initializer="identity", **kwargs
        )
        routing = router(self.probs(*rows))
        return routing.expert_indices, routing.expert_weights

    def test_by_hand(self):
        indices, weights = self.choices(
            0.55, [0.125, 0.5, 0.375], [0.625, 0.25, 0.125]
        )
        self.assertAllEqual(indices, [[1, 2, 3], [0, 3, 3]])
        self.assertAllClose(weights, [[0.5, 0.375, 0], [0.625, 0, 0]])

    def test_the_crossing_expert_is_the_last(self):
        # Equal probabilities of 1/4, in the order of the experts.
        for top_p, number in ((0.2, 1), (0.3, 2), (0.55, 3), (0.8, 4), (1, 4)):
            indices, _ = self.choices(top_p, [0.25] * 4)
            expected = [e if e < number else 4 for e in range(4)]
            self.assertAllEqual(indices, [expected])

    def test_max_experts(self):
        indices, weights = self.choices(1.0, [0.25] * 4, max_experts=2)
        self.assertAllEqual(indices, [[0, 1]])
        self.assertAllClose(weights, [[0.25, 0.25]])
        _, weights = self.choices(
            1.0, [0.25] * 4, max_experts=2, normalize_weights=True
        )
        self.assertAllClose(weights, [[0.5, 0.5]])

    def test_experts_without_any_probability(self):
        indices, weights = self.choices(1.0, [0.5, 1e-38, 0.5])
        router = TopPRouter(2, 1.0, kernel_initializer="identity")
        routing = router(np.array([[0.0, 200.0]], "float32"))
        self.assertAllEqual(routing.expert_indices, [[1, 2]])
        self.assertAllEqual(routing.expert_weights, [[1, 0]])
        self.assertAllEqual(ops.convert_to_numpy(indices)[:, :2], [[0, 2]])
        self.assertAllClose(weights, [[0.5, 0.5, 0.0]])

    def test_errors(self):
        for message, kwargs in (
            (r"`top_p` must be above 0 .* top_p=0$", {"top_p": 0}),
            (r"`top_p` must be .* at most 1. .*=1.5", {"top_p": 1.5}),
            (
                r"`max_experts` must be .* max_experts=5, num_experts=4",
                {"max_experts": 5},
            ),
            (
                "would get no gradient. Received: normalize_weights=True",
                {"max_experts": 1, "normalize_weights": True},
            ),
        ):
            with self.assertRaisesRegex(ValueError, message):
                TopPRouter(4, **kwargs)
        self.assertFalse(TopPRouter(4, max_experts=1).normalize_weights)
