from unittest import mock

import keras
import numpy as np
from keras import ops

from tests import token_loop
from tests.routing_cases import megablocks
from tests.routing_cases.cases import DATA
from tests.routing_cases.cases import RecordedTest
from tests.routing_cases.cases import load


class Loss(keras.layers.Layer):
    """One loss of what a router decides, as the output of a layer."""

    def __init__(self, router, loss):
        super().__init__()
        self.router = router
        self.loss = loss
        self.built = True

    def call(self, tokens):
        return self.loss(self.router(tokens, training=True))


def recorded_draws(uniform):
    """Makes `keras.random.uniform` return recorded draws."""

    def draw(shape, minval=0.0, maxval=1.0, **kwargs):
        return ops.array(minval + (maxval - minval) * uniform, "float32")

    return mock.patch.object(keras.random, "uniform", draw)


def computed_case(config):
    """A case of one layer, made here as INDEX.md says it is."""
    rng = np.random.default_rng(0)
    num_tokens, num_experts, top_k = config["N"], config["E"], config["k"]
    parts = {
        "x": rng.normal(size=(num_tokens, config["D"])),
        "weight": rng.normal(size=(num_experts, config["D"])),
    }
    uniform = rng.uniform(size=parts["x"].shape)
    epsilon = config["jitter_eps"]
    factors = 1 - epsilon + 2 * epsilon * uniform

    def logits(parts):
        return (parts["x"] * factors) @ parts["weight"].T

    scores = np.array([token_loop.softmax(z) for z in logits(parts)])
    indices = np.argsort(-scores, axis=1)[:, :top_k]
    weights = np.take_along_axis(scores, indices, 1)
    power = config["normalize_p"]
    norms = np.sum(weights**power, axis=1, keepdims=True) ** (1 / power)
    weights = weights / norms
    combine = np.zeros_like(scores)
    np.put_along_axis(combine, indices, weights, 1)
    counts = np.bincount(indices.ravel(), minlength=num_experts)

    def balance(parts):
        mean = np.mean([token_loop.softmax(z) for z in logits(parts)], axis=0)
        share = counts / (num_tokens * top_k)
        return config["moe_loss_weight"] * num_experts * np.sum(share * mean)

    def z_loss(parts):
        value = token_loop.router_z_loss(logits(parts))
        return config["moe_zloss_weight"] * value

    return {
        **{f"layer0/{name}": value for name, value in parts.items()},
        "layer0/jitter_uniform": uniform,
        "layer0/scores": scores,
        "layer0/topk_index": indices,
        "layer0/topk_weight": weights,
        "layer0/combine": combine,
        "layer0/tokens_per_expert": counts,
        "loss/load_balancing": balance(parts),
        "loss/router_z_per_layer": np.array([z_loss(parts)]),
        **{
            f"{kind}/layer0/{name}": gradient
            for kind, loss in (("grad_lb", balance), ("grad_z", z_loss))
            for name, gradient in token_loop.gradients(loss, parts).items()
        },
    }


class MegablocksTest(RecordedTest):
    def test_cases(self):
        for name, config, arrays in load(megablocks.matches):
            with self.subTest(name):
                self.check(config, arrays)

    def check(self, config, arrays):
        num_tokens, num_experts = config["N"], config["E"]
        balance, z = megablocks.losses_from_case(config)
        total = 0.0
        for layer in range(config["layers"]):
            own = {
                key.replace(f"layer{layer}/", ""): value
                for key, value in arrays.items()
                if f"layer{layer}/" in key
            }
            router = megablocks.router_from_case(config, arrays, layer)
            uniform = own.get("jitter_uniform", np.zeros_like(own["x"]))
            with recorded_draws(uniform):
                r = router(own["x"].astype("float32"), training=True)
                r = type(r)(*map(ops.convert_to_numpy, r))
                self.assert_relative(r.probs, own["scores"])
                self.assertAllEqual(r.expert_indices, own["topk_index"])
                self.assert_relative(r.expert_weights, own["topk_weight"])
                combine = np.zeros((num_tokens, num_experts))
                np.put_along_axis(
                    combine, r.expert_indices, r.expert_weights, 1
                )
                self.assert_relative(combine, own["combine"])
                counts = np.bincount(r.expert_indices.ravel())
                counts = np.append(counts, [0] * num_experts)[:num_experts]
                self.assertAllEqual(counts, own["tokens_per_expert"])
                for loss, kind in ((balance, "grad_lb"), (z, "grad_z")):
                    value, d_x, d_variables = self.outputs_and_gradients(
                        Loss(router, loss), own["x"].astype("float32")
                    )
                    if loss is z:
                        wanted = arrays["loss/router_z_per_layer"][layer]
                        self.assertAllClose(value, wanted, rtol=1e-5)
                    else:
                        total += value
                    (d_kernel,) = d_variables.values()
                    for actual, wanted in (
                        (d_x, own[f"{kind}/x"]),
                        (d_kernel.T, own[f"{kind}/weight"]),
                    ):
                        scale = np.abs(wanted).max()
                        self.assertGreater(scale, 0)
                        self.assertAllClose(
                            actual / scale, wanted / scale, rtol=0, atol=1e-5
                        )
        self.assertAllClose(total, arrays["loss/load_balancing"], rtol=1e-5)

    def test_norm_and_jitter_that_no_recorded_case_here_has(self):
        config = {
            **{"N": 5, "D": 3, "E": 4, "k": 2, "layers": 1},
            **{"normalize_p": 2, "jitter_eps": 0.2},
            **{"moe_loss_weight": 0.1, "moe_zloss_weight": 1e-3},
        }
        self.check(config, computed_case(config))

    def test_matches_no_other_family(self):
        names = [name for name, *_ in load(megablocks.matches)]
        for name in names:
            self.assertStartsWith(name, "megablocks")
        self.assertLen(names, len(list(DATA.glob("megablocks*.json"))))
