"""Sinkhorn routing against what Megatron did."""

import numpy as np
from keras import ops

from keras_moe.ops.sinkhorn import sinkhorn
from tests.routing_cases import sinkhorn as family
from tests.routing_cases.cases import load
from tests.test_case import TestCase


def iterations(logits, tolerance):
    """After how many iterations Megatron stops."""
    matrix = np.exp(logits.astype("float64"))
    tokens, experts = matrix.shape
    old = np.ones(experts)
    for count in range(1, 1000):
        rows = 1 / tokens / (matrix @ old + 1e-8)
        new = 1 / experts / (matrix.T @ rows + 1e-8)
        if np.abs(old - new).mean() <= tolerance:
            return count
        old = new
    raise AssertionError("no end")


class SinkhornCasesTest(TestCase):
    def test_cases(self):
        found = load(family.matches)
        for name, config, arrays in found:
            with self.subTest(name):
                self.check(config, arrays)

    def check(self, config, arrays):
        logits = arrays["logits"]
        for tolerance in config["tol"]:
            # Ours stops after a fixed number.
            matrix = sinkhorn(logits, iterations(logits, tolerance))
            recorded = arrays[f"sinkhorn_tol{tolerance:g}"]
            scale = np.abs(recorded).max()
            self.assert_relative(matrix / scale, recorded / scale)
        router = family.router_from_case(config, arrays)
        for training, name in (
            (True, "top1_of_sinkhorn"),
            (False, "top1_of_logits"),
        ):
            routing = router(logits, training=training)
            chosen = ops.convert_to_numpy(routing.expert_indices)[:, 0]
            self.assertAllEqual(chosen, arrays[name])
            # The weight is the sigmoid of the logit, without Sinkhorn.
            weights = 1 / (1 + np.exp(-logits[np.arange(len(logits)), chosen]))
            self.assert_relative(routing.expert_weights[:, 0], weights)
