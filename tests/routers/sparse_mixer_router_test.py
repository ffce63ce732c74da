import json
import pathlib
from unittest import mock

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.routers.sparse_mixer_router import SparseMixerRouter
from tests import token_loop
from tests.routers.logits_checks import DIM
from tests.routers.logits_checks import TOKENS
from tests.routers.logits_checks import LogitsChecks
from tests.routers.logits_checks import RoutingMatrix
from tests.routers.logits_checks import combine_matrix
from tests.test_case import TestCase

PHIMOE = pathlib.Path(__file__).parents[1] / "data" / "blocks" / "phimoe"


def near(logits, left, epsilon):
    """The experts left that may be sampled."""
    best = max(logits[e] for e in left)
    return [
        e
        for e in left
        if (best - logits[e]) / max(abs(logits[e]), best) <= 2 * epsilon
    ]


class SparseMixerRouterTest(LogitsChecks, TestCase):
    def make(self, **kwargs):
        return SparseMixerRouter(4, **{"jitter_epsilon": 0.5, **kwargs})

    def loop(self, token, context, weights):
        logits = token @ weights["kernel"] + weights.get("bias", 0.0)
        left, chosen = [0, 1, 2, 3], {}
        for _ in range(2):
            able = near(logits, left, 0.5)
            expert = max(left, key=lambda e: logits[e])
            probs = token_loop.softmax(logits[able])
            chosen[expert] = probs[able.index(expert)]
            left.remove(expert)
        return logits, token_loop.softmax(logits), chosen

    def test_against_loop(self):
        self.check_against_loop(use_bias=True)

    def drawing(self, draws):
        """Feeds in uniform draws, one array a call."""
        draws = iter(draws)

        def uniform(shape, *args, dtype=None, **kwargs):
            values = next(draws)
            self.assertEqual(tuple(shape), values.shape)
            return ops.convert_to_tensor(values, dtype=dtype)

        return mock.patch.object(keras.random, "uniform", uniform)

    def test_estimator(self):
        """Samples and gradients, derived by hand for each token."""
        router = self.built()
        tokens = self.tokens()
        rng = np.random.default_rng(6)
        draws = []
        for _ in range(2):
            draws.append(rng.uniform(size=(TOKENS, 4)))
            draws.append(rng.uniform(size=(TOKENS, 1)))
        cotangent = rng.normal(size=(TOKENS, 12)).astype("float32")
        cotangent[:, :8] = 0
        layer = RoutingMatrix(router)
        layer.build((None, DIM))
        with self.drawing(draws):
            outputs, d_tokens, d_weights = self.outputs_and_gradients(
                layer, tokens, cotangent, training=True
            )
        kernel = ops.convert_to_numpy(router.kernel).astype("float64")
        combine = np.zeros((TOKENS, 4))
        d_logits = np.zeros((TOKENS, 4))
        kinds = set()
        for t in range(TOKENS):
            logits, left = tokens[t] @ kernel, [0, 1, 2, 3]
            for k in range(2):
                able = near(logits, left, 0.5)
                gumbel = -np.log(-np.log(draws[2 * k][t]))
                expert = max(able, key=lambda e: logits[e] + gumbel[e])
                probs = dict(
                    zip(able, token_loop.softmax(logits[able]), strict=True)
                )
                is_best = expert == max(able, key=lambda e: logits[e])
                whole = is_best or draws[2 * k + 1][t, 0] > 0.75
                kinds.add((is_best, whole))
                factor = 1.0 if whole else 1 / 3
                combine[t, expert] = factor * probs[expert]
                for e in able:  # d probs[expert] / d logits[e]
                    slope = probs[expert] * ((e == expert) - probs[e])
                    d_logits[t, e] += cotangent[t, 8 + expert] * slope
                left.remove(expert)
        self.assertEqual(kinds, {(True, True), (False, True), (False, False)})
        self.assert_relative(outputs[:, 8:], combine)
        self.assert_relative(d_tokens, d_logits @ kernel.T)
        (d_kernel,) = d_weights.values()
        self.assert_relative(d_kernel, tokens.T.astype("float64") @ d_logits)

    def test_frequencies(self):
        router = SparseMixerRouter(3, top_k=1, jitter_epsilon=1.0, seed=1)
        router.build((None, 1))
        router.kernel.assign([[1.0, 1.5, 2.0]])
        routing = router(np.ones((20000, 1), "float32"), training=True)
        probs = token_loop.softmax(np.array([1.0, 1.5, 2.0]))
        weights = ops.convert_to_numpy(combine_matrix(routing, 3))
        self.assertAllClose((weights > 0).mean(axis=0), probs, atol=0.02)
        # The best as it is, of the others a third in 3 of 4 cases.
        mean = 0.25 + 0.75 / 3
        self.assertAllClose(
            weights.sum(axis=0) / (weights > 0).sum(axis=0),
            probs * [mean, mean, 1.0],
            atol=0.01,
        )

    def test_all_logits_equal(self):
        routing = SparseMixerRouter(4, 3)(np.zeros((2, DIM), "float32"))
        self.assertAllEqual(routing.expert_indices, [[0, 1, 2]] * 2)
        self.assertAllClose(routing.expert_weights, [[1 / 4, 1 / 3, 1 / 2]] * 2)

    def test_one_expert_is_near(self):
        router = self.built(jitter_epsilon=0.0)
        routing = router(self.tokens(), training=True)
        self.assertAllClose(routing.expert_weights, np.ones((TOKENS, 2)))
        self.assertAllEqual(
            routing.expert_indices, router(self.tokens()).expert_indices
        )

    def test_one_expert(self):
        for training in (False, True):
            routing = SparseMixerRouter(1, 1)(self.tokens(), training=training)
            self.assertAllEqual(routing.expert_indices, np.zeros((TOKENS, 1)))
            self.assertAllEqual(routing.expert_weights, np.ones((TOKENS, 1)))

    def test_recorded_block(self):
        spec = json.loads(PHIMOE.with_suffix(".json").read_text())["spec"]
        with np.load(PHIMOE.with_suffix(".npz")) as archive:
            arrays = dict(archive)
        kernel = arrays["w/router.weight"].T
        dim, num_experts = kernel.shape
        gate_up = arrays["w/experts.gate_up_proj"]
        down = arrays["w/experts.down_proj"]
        layer = MoE(
            router=SparseMixerRouter(
                num_experts,
                spec["router"]["k"],
                spec["router"]["jitter_eps"],
            ),
            experts=GLUExperts(num_experts, down.shape[-1], "silu"),
            losses=None,
        )
        layer.build((None, dim))
        layer.router.kernel.assign(kernel)
        gate, up = np.split(gate_up.swapaxes(1, 2), 2, axis=-1)
        layer.experts.gate_kernel.assign(gate)
        layer.experts.up_kernel.assign(up)
        layer.experts.down_kernel.assign(down.swapaxes(1, 2))
        routing = layer.route(arrays["x"])
        self.assert_relative(routing.logits, arrays["router_logits"])
        self.assert_relative(
            combine_matrix(routing, num_experts), arrays["combine"]
        )
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer, arrays["x"], arrays["cotangent"]
        )
        self.assert_relative(outputs, arrays["y"])
        self.assert_relative(d_inputs, arrays["grad/x"])
        (d_kernel,) = (
            v
            for k, v in d_weights.items()
            if k.endswith("router/kernel") or "sparse_mixer" in k
        )
        self.assert_relative(d_kernel, arrays["grad/w/router.weight"].T)

    @parameterized.parameters(
        ({"top_k": 5}, "top_k=5, num_experts=4"),
        ({"jitter_epsilon": -0.1}, "jitter_epsilon=-0.1"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            self.make(**kwargs)
