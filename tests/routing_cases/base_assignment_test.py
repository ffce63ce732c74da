"""Balanced assignment against what fairseq did.

Its auction has a coarse increment and ends up to 1.6 % below the optimum. So
the loads are compared exactly, and its total score is a lower bound.
"""

import numpy as np
from keras import ops

from tests.ops.balanced_assignment_test import best_total
from tests.routing_cases import base_assignment
from tests.routing_cases.cases import load
from tests.test_case import TestCase


class BaseAssignmentCasesTest(TestCase):
    def test_cases(self):
        found = load(base_assignment.matches)
        for name, config, arrays in found:
            with self.subTest(name):
                self.check(config, arrays)

    def check(self, config, arrays):
        scores = arrays["scores"]
        tokens, experts = scores.shape
        router = base_assignment.router_from_case(config, arrays)
        routing = router(scores, training=True)
        chosen = ops.convert_to_numpy(routing.expert_indices)[:, 0]
        loads = np.bincount(chosen, minlength=experts)
        recorded = np.bincount(arrays["expert_of_token"], minlength=experts)
        self.assertAllEqual(loads, recorded)
        total = scores[np.arange(tokens), chosen].sum(dtype="float64")
        slack = 1e-5 * max(abs(arrays["total_score"]), 1.0)
        self.assertGreaterEqual(total, arrays["total_score"] - slack)
        self.assertBetween(total - best_total(scores), -slack, slack)
        weights = 1 / (1 + np.exp(-scores[np.arange(tokens), chosen]))
        self.assert_relative(routing.expert_weights[:, 0], weights)
        # In evaluation each token takes its best expert.
        greedy = ops.convert_to_numpy(router(scores).expert_indices)[:, 0]
        self.assertAllEqual(greedy, scores.argmax(-1))
