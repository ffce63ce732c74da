import math

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import AttentionPooling
from tests.test_case import TestCase


def norm(x, gain, bias=0.0):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain + bias


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class AttentionPoolingTest(TestCase):
    @parameterized.parameters(False, True)
    def test_formula(self, qk_norm):
        rng = np.random.default_rng(0)
        tokens = rng.normal(size=(3, 5, 8))
        layer = AttentionPooling(2, 16, qk_norm=qk_norm, activation="relu")
        layer.build(tokens.shape)
        weights = {}
        for variable in layer.weights:
            variable.assign(rng.normal(size=variable.shape) / 2)
            value = ops.convert_to_numpy(variable)
            weights["/".join(variable.path.split("/")[1:])] = value

        def dense(name, x, equation):
            name = f"attention/{name}/"
            return (
                np.einsum(equation, x, weights[name + "kernel"])
                + weights[name + "bias"]
            )

        probe = np.repeat(weights["probe"], 3, 0)
        q = dense("query", probe, "bnd,dhc->bnhc")
        k, v = (dense(n, tokens, "bnd,dhc->bnhc") for n in ("key", "value"))
        if qk_norm:
            q = norm(q, weights["attention/query_norm/gamma"])
            k = norm(k, weights["attention/key_norm/gamma"])
        scores = np.einsum("bqhc,bnhc->bhqn", q, k) / math.sqrt(4)
        mixed = np.einsum("bhqn,bnhc->bqhc", softmax(scores), v)
        a = dense("attention_output", mixed, "bqhc,hcd->bqd")
        h = norm(a, weights["norm/gamma"], weights["norm/beta"])
        h = h @ weights["mlp/dense_1/kernel"] + weights["mlp/dense_1/bias"]
        h = np.maximum(h, 0) @ weights["mlp/dense_2/kernel"]
        wanted = a + h + weights["mlp/dense_2/bias"]
        self.assert_relative(layer(tokens), wanted[:, 0])

    def test_config(self):
        layer = AttentionPooling(2, 16, qk_norm=True, dtype="mixed_bfloat16")
        again = AttentionPooling.from_config(layer.get_config())
        self.assertEqual(again.get_config(), layer.get_config())
        outputs = again(keras.KerasTensor((3, 5, 8)))
        self.assertEqual((outputs.shape, outputs.dtype), ((3, 8), "bfloat16"))

    def test_errors(self):
        for arguments, words in (
            ((0, 4), "`num_heads` must be an int"),
            ((2, 0), "`mlp_dim` must be an int"),
            ((2, 4, 2), "`qk_norm` must be True or False"),
            ((2, 4, False, 0), "`layer_norm_epsilon` must be"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                AttentionPooling(*arguments)
        with self.assertRaisesRegex(ValueError, "must divide .* width of 8"):
            AttentionPooling(3, 4)(np.ones((3, 5, 8)))
