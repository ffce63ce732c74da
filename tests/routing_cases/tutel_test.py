"""With batch priority and a capacity factor of 0 or less, Tutel computes a
capacity far below the largest load, a mistake: there nothing may be dropped.
"""

import math

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from tests.routing_cases import cases
from tests.routing_cases import tutel
from tests.test_case import TestCase


def is_dispatch(config, arrays):
    return tutel.matches(config, arrays) and "capacity_factor" in config


def is_load_importance(config, arrays):
    return tutel.matches(config, arrays) and "capacity_factor" not in config


DISPATCH = cases.named(is_dispatch)
LOAD_IMPORTANCE = cases.named(is_load_importance)


class TutelTest(TestCase):
    def layer(self, config, arrays, **kwargs):
        num_experts, dim = config["E"], config["D"]
        kernel = np.zeros((num_experts, dim, 1), "float32")
        bias = np.zeros((num_experts, 1), "float32")
        return tutel.layer_from_case(config, arrays, kernel, bias, **kwargs)

    @parameterized.named_parameters(DISPATCH)
    def test_dispatch(self, case):
        _, config, arrays = case
        layer = self.layer(config, arrays)
        routing = layer.route(arrays["x"])
        self.assert_relative(routing.probs, arrays["scores"])
        self.assertAllEqual(routing.expert_indices, arrays["topk_index"])
        self.assert_relative(routing.expert_weights, arrays["gates"])
        combined = cases.combine_matrix(layer, routing, config["N"])
        automatic = config["capacity_factor"] <= 0
        if automatic and config["batch_prioritized"]:
            self.assertEqual((combined > 0).sum(), config["N"] * config["k"])
            self.assertLess(arrays["kept"].sum(), config["N"] * config["k"])
            return
        self.assert_relative(combined, arrays["combine_kept"])
        if not automatic:
            capacity = layer.capacity.rows_per_expert(
                config["N"], config["E"], config["k"], True
            )
            self.assertEqual(capacity, int(arrays["capacity"]))

    @parameterized.named_parameters(DISPATCH)
    def test_loss(self, case):
        _, config, arrays = case
        loss = losses.LoadBalancingLoss(1.0, assignments="first")
        layer = self.layer(config, arrays, losses=loss)
        routing = layer.route(arrays["x"])
        self.assert_relative(loss(routing), arrays["gshard_loss"])
        _, d_inputs, d_weights = self.outputs_and_gradients(
            layer, arrays["x"], losses=True, training=True
        )
        self.assert_relative(d_inputs, arrays["grad_gshard/x"])
        self.assert_relative(
            d_weights["kernel"], arrays["grad_gshard/w_gate"].T
        )

    @parameterized.named_parameters(LOAD_IMPORTANCE)
    def test_importance(self, case):
        # Its load compares softmax values with the widths of logits. What is
        # left of the recorded loss without that is the importance loss.
        _, config, arrays = case
        logits = (arrays["x"] @ arrays["w_gate"].T).astype("float64")
        num_experts, k = config["E"], config["k"]
        noisy = logits + arrays["noise_unit"] / num_experts

        def softmax(z):
            e = np.exp(z - z.max(axis=-1, keepdims=True))
            return e / e.sum(axis=-1, keepdims=True)

        threshold = np.sort(noisy, axis=-1)[:, -k][:, None]
        scaled = (softmax(logits) - threshold) * num_experts
        cdf = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))
        load = cdf(scaled).sum(axis=0)
        load_loss = load.var(ddof=1) / load.mean() ** 2
        router = tutel.router_from_case(config, arrays)
        loss = losses.ImportanceLoss(1.0, scores="router", ddof=1)
        value = loss(router(ops.array(arrays["x"])))
        value = float(ops.convert_to_numpy(value))
        self.assert_relative(
            (value + load_loss) / 2, arrays["loss_mixed"], 1e-4
        )
