"""davidmrau's load takes softmax values for thresholds of logits, a mistake:
only its gates, importance and outputs are compared. FastMoE has it right. With
one expert a token FastMoE's weight is always 1, so that no gradient reaches the
router from the outputs, which this library refuses: there the weight is the
probability, and the load alone is compared.
"""

import numpy as np
from absl.testing import parameterized
from keras import ops

from tests.routing_cases import cases
from tests.routing_cases import noisy_top_k
from tests.test_case import TestCase

NAMED = cases.named(noisy_top_k.matches)


def cv_squared(values):
    return values.var(ddof=1) / values.mean() ** 2


class NoisyTopKTest(TestCase):
    def route(self, case):
        _, config, arrays = case
        router = noisy_top_k.router_from_case(config, arrays)
        with noisy_top_k.draws(config, arrays):
            return router(ops.array(arrays["x"]), training=config["training"])

    @parameterized.named_parameters(NAMED)
    def test_weights(self, case):
        _, config, arrays = case
        weights = cases.dense_weights(self.route(case), config["E"])
        wanted = arrays["gates" if "gates" in arrays else "combine"]
        self.assertAllEqual(weights > 0, wanted > 0)
        if config["k"] > 1:
            self.assert_relative(weights, wanted)
        if "importance" in arrays:
            self.assert_relative(weights.sum(axis=0), arrays["importance"])

    @parameterized.named_parameters(NAMED)
    def test_losses(self, case):
        _, config, arrays = case
        importance, load = noisy_top_k.importance_and_load()
        routing = self.route(case)
        gates = arrays["gates" if "gates" in arrays else "combine"]
        wanted_importance = cv_squared(gates.sum(axis=0).astype("float64"))
        if config["k"] > 1:
            self.assert_relative(importance(routing), wanted_importance)
        if noisy_top_k.is_davidmrau(config):
            if config["training"]:
                # Loads sum to k a token, which the recorded ones do not.
                total = float(ops.convert_to_numpy(ops.sum(routing.load)))
                wanted = config["k"] * config["N"]
                self.assertLess(abs(total - wanted), 0.1 * wanted)
                self.assertGreater(
                    abs(arrays["load"].sum() - wanted), 0.1 * wanted
                )
            else:
                loads = ops.sum(routing.load, axis=0)
                self.assert_relative(loads, arrays["load"])
            return
        self.assert_relative(load(routing) + wanted_importance, arrays["loss"])

    @parameterized.named_parameters(NAMED)
    def test_gradients(self, case):
        _, config, arrays = case
        if noisy_top_k.is_davidmrau(config):
            self.skipTest("the recorded loss is not the one of the paper")
        importance, load = noisy_top_k.importance_and_load()
        losses = [load] if config["k"] == 1 else [importance, load]
        num_experts, dim = config["E"], config["D"]
        layer = cases.moe_with_linear_experts(
            noisy_top_k.router_from_case(config, arrays),
            np.zeros((num_experts, dim, 1), "float32"),
            np.zeros((num_experts, 1), "float32"),
            losses=losses,
        )
        with noisy_top_k.draws(config, arrays):
            _, d_inputs, d_weights = self.outputs_and_gradients(
                layer, arrays["x"], losses=True, training=True
            )
        self.assert_relative(d_inputs, arrays["grad_loss/x"], 1e-4)
        for path, name in (("kernel", "w_gate"), ("noise_kernel", "w_noise")):
            self.assert_relative(
                d_weights[path], arrays[f"grad_loss/{name}"], 1e-4
            )
