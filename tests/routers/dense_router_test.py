import numpy as np
from keras import ops

from keras_moe.routers.dense_router import DenseRouter
from tests import token_loop
from tests.routers.variable_k_checks import LoopChecks
from tests.routers.variable_k_checks import VariableKChecks
from tests.test_case import TestCase


class Parts:
    score_activation = "softmax"

    def make(self, num_experts, **kwargs):
        options = {
            "score_activation": self.score_activation,
            "use_bias": True,
            "kernel_initializer": "glorot_normal",
            "bias_initializer": "glorot_normal",
            **kwargs,
        }
        return DenseRouter(num_experts, **options)

    def loop(self, tokens, weights):
        score = getattr(token_loop, self.score_activation)
        logits = tokens @ weights["kernel"] + weights["bias"]
        return np.stack([score(row) for row in logits])

    def check_order(self, indices, weights):
        self.assertAllEqual(indices, range(5))


class DenseRouterTest(Parts, VariableKChecks, TestCase):
    def test_probs_are_the_weights(self):
        routing = self.make(5)(self.tokens())
        self.assertAllEqual(routing.probs, routing.expert_weights)
        if self.score_activation == "softmax":
            total = ops.sum(routing.expert_weights, axis=-1)
            self.assert_relative(total, np.ones(12))

    def test_errors(self):
        self.assert_raises_for(
            r"`score_activation` must be .*='relu'", score_activation="relu"
        )


class SigmoidTest(Parts, LoopChecks, TestCase):
    score_activation = "sigmoid"
