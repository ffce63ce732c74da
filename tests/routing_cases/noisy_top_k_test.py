"""davidmrau's load takes softmax values for thresholds of logits, a mistake: in
training, its part of the recorded loss is recomputed here. FastMoE has it
right. With one expert a token FastMoE's weight is always 1, so that no gradient
reaches the router from the outputs, which this library refuses: there the
weight is the probability, and the load alone is compared.
"""

import math

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import LayerExperts
from keras_moe.layers import MoE
from tests import token_loop
from tests.routing_cases import cases
from tests.routing_cases import noisy_top_k
from tests.test_case import TestCase

NAMED = cases.named(noisy_top_k.matches)


def cv_squared(values):
    return values.var(ddof=1) / values.mean() ** 2


def mistaken_load(config, arrays, parts):
    """davidmrau's: thresholds are probabilities, compared with logits."""
    parts = {k: v.astype("float64") for k, v in parts.items()}
    clean = parts["x"] @ parts["w_gate"]
    stddev = np.log1p(np.exp(parts["x"] @ parts["w_noise"]))
    stddev = stddev + config["noise_epsilon"]
    noisy = clean + stddev * arrays["noise_unit"]
    probs = np.array([token_loop.softmax(row) for row in noisy])
    best = np.sort(probs, axis=-1)[:, ::-1]
    if_in = best[:, config["k"]][:, None]
    if_out = best[:, config["k"] - 1][:, None]
    threshold = np.where(noisy > if_in, if_in, if_out)
    cdf = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))
    return cdf((clean - threshold) / stddev).sum(axis=0)


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
        if "topk_index" in arrays:
            routing = self.route(case)
            self.assertAllEqual(routing.expert_indices, arrays["topk_index"])
            if config["k"] > 1:
                self.assert_relative(
                    routing.expert_weights, arrays["topk_weight"]
                )
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
        importance, load = noisy_top_k.importance_and_load()
        losses = [load] if config["k"] == 1 else [importance, load]
        names = ("x", "w_gate", "w_noise")
        mistaken = dict.fromkeys(names, 0.0)
        if noisy_top_k.is_davidmrau(config):
            losses = [importance]
            load_part = cv_squared(arrays["load"].astype("float64"))
            if config["training"]:
                parts = {name: arrays[name] for name in names}
                self.assert_relative(
                    mistaken_load(config, arrays, parts), arrays["load"], 1e-4
                )
                mistaken = token_loop.gradients(
                    lambda parts: cv_squared(
                        mistaken_load(config, arrays, parts)
                    ),
                    parts,
                )
            gates = arrays["gates"].sum(axis=0).astype("float64")
            self.assert_relative(
                config["loss_coef"] * (cv_squared(gates) + load_part),
                arrays["loss"],
            )
        num_experts, dim = config["E"], config["D"]
        layer = cases.moe_with_linear_experts(
            noisy_top_k.router_from_case(config, arrays),
            np.zeros((num_experts, dim, 1), "float32"),
            np.zeros((num_experts, 1), "float32"),
            losses=losses,
        )
        # Losses are there in training alone, where the original ran without
        # noise, too.
        noise = np.zeros((config["N"], num_experts))
        noise = arrays["noise_unit"] if config["training"] else noise
        with cases.recorded_draws(normal=(noise,)):
            _, d_inputs, d_weights = self.outputs_and_gradients(
                layer, arrays["x"], losses=True, training=True
            )
        d_weights["x"] = d_inputs
        for path, name in (
            *(("x", "x"), ("kernel", "w_gate")),
            ("noise_kernel", "w_noise"),
        ):
            self.assert_relative(
                config.get("loss_coef", 1.0)
                * (d_weights[path] + mistaken[name]),
                arrays.get(f"grad_loss/{name}", 0.0),
                1e-4,
            )

    @parameterized.named_parameters(NAMED)
    def test_outputs(self, case):
        _, config, arrays = case
        if "y" not in arrays:
            self.assertFalse(noisy_top_k.is_davidmrau(config))
            return
        width = arrays["y"].shape[1]
        experts = [
            keras.Sequential(
                [
                    keras.Input((config["D"],)),
                    keras.layers.Dense(
                        len(arrays[f"expert/{e}.fc1.bias"]), "relu"
                    ),
                    keras.layers.Dense(width, "softmax"),
                ]
            )
            for e in range(config["E"])
        ]
        for e, expert in enumerate(experts):
            for dense, name in zip(expert.layers, ("fc1", "fc2"), strict=True):
                dense.kernel.assign(arrays[f"expert/{e}.{name}.weight"].T)
                dense.bias.assign(arrays[f"expert/{e}.{name}.bias"])
        layer = MoE(
            router=noisy_top_k.router_from_case(config, arrays),
            experts=LayerExperts(experts),
            losses=None,
            statistics=None,
        )
        layer.build(arrays["x"].shape)
        with noisy_top_k.draws(config, arrays):
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                layer,
                arrays["x"],
                arrays["cotangent"],
                training=config["training"],
            )
        self.assert_relative(outputs, arrays["y"])
        self.assert_relative(d_inputs, arrays["grad_y/x"])
        for path, name in (("kernel", "w_gate"), ("noise_kernel", "w_noise")):
            wanted = arrays.get(f"grad_y/{name}", 0.0)
            self.assert_relative(d_weights[path], wanted)
