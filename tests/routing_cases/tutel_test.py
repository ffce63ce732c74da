"""With batch priority and a capacity factor of 0 or less, Tutel computes a
capacity far below the largest load, a mistake: there nothing may be dropped.
"""

import math

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from tests import token_loop
from tests.routing_cases import cases
from tests.routing_cases import tutel
from tests.routing_cases.cases import RecordedTest


def is_dispatch(config, arrays):
    return tutel.matches(config, arrays) and "capacity_factor" in config


def is_load_importance(config, arrays):
    return tutel.matches(config, arrays) and "capacity_factor" not in config


DISPATCH = cases.named(is_dispatch)
LOAD_IMPORTANCE = cases.named(is_load_importance)


class TutelTest(RecordedTest):
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
        # Its load compares softmax values with the widths of logits, or, as
        # recorded too, with the widths of noisy probabilities. Half of the
        # recorded loss is such a load, recomputed here; the other half is the
        # importance loss.
        _, config, arrays = case
        loss = losses.ImportanceLoss(1.0, scores="router", ddof=1)
        layer = self.layer_of_loss(config, arrays, loss)
        _, d_inputs, d_weights = self.outputs_and_gradients(
            layer, arrays["x"], losses=True, training=True
        )
        routing = layer.route(arrays["x"])
        self.assert_relative(routing.probs, arrays["scores_clean"])
        value = float(ops.convert_to_numpy(loss(routing)))
        for name in ("loss_mixed", "loss_scores"):
            load = load_loss(config, arrays, arrays, name == "loss_mixed")
            self.assert_relative((value + load) / 2, arrays[name], 1e-4)
        wanted = token_loop.gradients(
            lambda parts: load_loss(config, arrays, parts, mixed=True),
            {name: arrays[name] for name in ("x", "w_gate")},
        )
        for name, gradient in (
            ("x", d_inputs),
            ("w_gate", d_weights["kernel"].T),
        ):
            recorded = arrays[f"grad_mixed/{name}"]
            scale = np.abs(recorded).max()
            self.assert_relative(
                (gradient + wanted[name]) / 2 / scale, recorded / scale, 1e-4
            )

    def layer_of_loss(self, config, arrays, loss):
        config = {
            **{"capacity_factor": 0, "alignment": 1},
            **{"batch_prioritized": False, **config},
        }
        return self.layer(config, arrays, losses=loss)


def load_loss(config, arrays, parts, mixed):
    """Tutel's, of the clean probabilities and thresholds of the noisy ones."""
    num_experts, k = config["E"], config["k"]
    logits = parts["x"].astype("float64") @ parts["w_gate"].T
    noisy = logits + arrays["noise_unit"] * config["gate_noise"] / num_experts
    if mixed and parts is arrays:
        best = np.sort(noisy, axis=-1)[:, ::-1][:, :k]
        np.testing.assert_allclose(
            best, arrays["topk_noisy_logits"], rtol=1e-4, atol=1e-5
        )
    if not mixed:
        noisy = np.array([token_loop.softmax(row) for row in noisy])
    clean = np.array([token_loop.softmax(row) for row in logits])
    threshold = np.sort(noisy, axis=-1)[:, -k][:, None]
    scaled = (clean - threshold) * num_experts / config["gate_noise"]
    cdf = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))
    load = cdf(scaled).sum(axis=0)
    return load.var(ddof=1) / load.mean() ** 2
