"""Gradients of gradients on PyTorch, against plain loops in float64."""

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import GLUExperts
from keras_moe.experts import MixedExperts
from keras_moe.experts import MLPExperts
from keras_moe.moe.moe import MoE
from keras_moe.ops import grouped_matmul
from keras_moe.routers import TopKRouter
from tests.backend.fused_experts_test import operands
from tests.test_case import TestCase

if keras.config.backend() != "torch":
    pytest.skip("for PyTorch", allow_module_level=True)

import torch

from keras_moe.backend.torch.fused_experts import expert_loop

silu = torch.nn.functional.silu


def penalty_gradients(function, inputs, linear):
    """Of the squared gradients of a sum of the output, and of its tanh.

    In the first the gradient that arrives at the function needs none itself.
    """
    out = function(*inputs)
    out = out.sum() if linear else out.tanh().sum()
    first = torch.autograd.grad(out, inputs, create_graph=True)
    penalty = sum((d**2).sum() for d in first)
    second = torch.autograd.grad(penalty, inputs, materialize_grads=True)
    return [d.double().numpy() for d in second]


def leaves(arrays, dtype):
    return [torch.tensor(a, dtype=dtype).requires_grad_() for a in arrays]


class SecondOrderTest(TestCase):
    def check(self, ours, plain, arrays, dtype=torch.float32):
        for linear in (True, False):
            actual = penalty_gradients(ours, leaves(arrays, dtype), linear)
            exact = penalty_gradients(
                plain, leaves(arrays, torch.float64), linear
            )
            self.assertGreater(sum(np.abs(d).sum() for d in exact), 0.1)
            for a, e in zip(actual, exact, strict=True):
                self.assert_relative(a, e, 1e-4)

    @parameterized.parameters("expert_loop", "grouped_mm")
    def test_grouped_matmul(self, implementation):
        rng = np.random.default_rng(0)
        sizes = (5, 0, 9, 1)
        arrays = rng.normal(size=(18, 8)), rng.normal(size=(4, 8, 12))

        def ours(lhs, rhs):
            return grouped_matmul(lhs, rhs, sizes, implementation) ** 2

        def plain(lhs, rhs):
            group = np.repeat(np.arange(4), sizes)
            return torch.einsum("nd,ndf->nf", lhs[:15], rhs[group]) ** 2

        self.check(ours, plain, arrays)

    @parameterized.parameters(True, False)
    def test_fused_experts(self, use_bias):
        sizes = (5, 0, 9, 1)
        given = operands(10, 2, sizes, use_bias=use_bias)
        names = ("tokens", "row_weights")
        arrays = [given[name] for name in names] + given["kernels"]
        arrays += given["biases"] if use_bias else []
        choices = torch.tensor(given["choices"])

        def ours(tokens, weights, *banks):
            return expert_loop(
                tokens,
                weights,
                choices,
                torch.tensor(sizes),
                banks[:3],
                banks[3:] or (None,) * 3,
                lambda gate, up: silu(gate) * up,
            )

        def plain(tokens, weights, *banks):
            out = [torch.zeros(12, dtype=tokens.dtype)] * 10
            for n, e in enumerate(np.repeat(np.arange(4), sizes)):
                t = int(choices[n]) % 10
                biases = banks[3:] or [banks[0].new_zeros(4, 1)] * 3
                (w1, b1), (w2, b2), (w3, b3) = (
                    (k[e], b[e]) for k, b in zip(banks[:3], biases, strict=True)
                )
                h = silu(tokens[t] @ w1 + b1) * (tokens[t] @ w2 + b2)
                out[t] = out[t] + weights[n] * (h @ w3 + b3)
            return torch.stack(out)

        self.check(ours, plain, arrays)

    def test_fused_experts_without_slope(self):
        given = operands(10, 2, (5, 0, 9, 1))
        kernels = [torch.tensor(k) for k in given["kernels"]]
        kernels[0].requires_grad_()
        out = expert_loop(
            torch.tensor(given["tokens"]),
            torch.tensor(given["row_weights"]),
            torch.tensor(given["choices"]),
            torch.tensor(given["sizes"]),
            kernels,
            [None] * 3,
            lambda gate, up: ops.cast(gate + up > 0, gate.dtype),
        )
        (first,) = torch.autograd.grad(out.sum(), kernels[0], create_graph=True)
        self.assertEqual(float(first.abs().sum()), 0)

    @parameterized.named_parameters(
        ("fused", {}),
        ("expert_loop", {"implementation": "expert_loop"}),
        ("grouped_mm", {"implementation": "grouped_mm"}),
        ("capacity", {"capacity_factor": 100.0}),
        ("mixed", {"mixed": True}),
    )
    def test_moe(self, options):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(10, 8)).astype("float32")
        options = dict(options)
        factor = options.pop("capacity_factor", None)
        mixed = options.pop("mixed", False)
        experts = GLUExperts(4, 12, **options)
        if mixed:
            experts = MixedExperts([experts, MLPExperts(1, 4)])
        layer = MoE(
            router=TopKRouter(experts.num_experts, 2),
            experts=experts,
            losses=None,
            statistics=None,
            capacity_factor=factor,
        )
        layer.build(x.shape)
        arrays = [
            x,
            *(3 * rng.normal(size=v.shape) for v in layer.trainable_variables),
        ]

        def ours(x, *weights):
            others = [v.value for v in layer.non_trainable_variables]
            return layer.stateless_call(weights, others, x)[0]

        def plain(x, kernel, *banks):
            probs = torch.softmax(x @ kernel, -1)
            best, index = torch.topk(probs, 2)
            best = best / best.sum(-1, keepdim=True)
            out = []
            for t in range(10):
                out.append(0)
                for weight, e in zip(best[t], index[t].tolist(), strict=True):
                    if e < 4:
                        gate, up, down = (bank[e] for bank in banks[:3])
                        y = (silu(x[t] @ gate) * (x[t] @ up)) @ down
                    else:
                        up, b1, down, b2 = (bank[0] for bank in banks[3:])
                        y = torch.relu(x[t] @ up + b1) @ down + b2
                    out[-1] = out[-1] + weight * y
            return torch.stack(out)

        self.check(ours, plain, arrays)
