"""A forward pass executes the products of the chosen experts alone.

Each backend is asked what it really ran: torch by its FLOP counter, TensorFlow
by counting rows inside of the graph, JAX by interpreting the traced program
product by product, loops included.
"""

import contextlib
import unittest.mock

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MoE
from tests.test_case import TestCase

T, D, F, E, K = 512, 16, 64, 16, 2
ROUTER = 2 * T * D * E
COMBINE = 2 * T * K * D
MATRICES = {"glu": 3, "mlp": 2}


def expert_cost(experts, rows):
    return MATRICES[experts] * 2 * rows * D * F


class CostTest(TestCase):
    @parameterized.product(experts=("glu", "mlp"), skewed=(False, True))
    def test_products_of_a_forward_pass(self, experts, skewed):
        layer = MoE(E, F, top_k=K, experts=experts)
        layer.build((None, D))
        x = np.random.default_rng(0).normal(size=(T, D)).astype("float32")
        if skewed:  # expert 3 is everyone's first choice
            x = np.abs(x)
            kernel = ops.convert_to_numpy(layer.router.kernel).copy()
            kernel[:, 3] = 5.0
            layer.router.kernel.assign(kernel)
        measure = {
            "jax": _flops_jax,
            "tensorflow": _flops_tensorflow,
            "torch": _flops_torch,
        }[keras.config.backend()]
        flops = measure(layer, x)
        active = expert_cost(experts, T * K)
        rows_of_experts = np.bincount(
            ops.convert_to_numpy(layer.route(x).expert_indices).reshape(-1),
            minlength=E,
        )
        padding = expert_cost(experts, _free_places(rows_of_experts))
        self.assertGreaterEqual(flops, active)
        self.assertLessEqual(flops, 1.1 * active + ROUTER + COMBINE + padding)
        # The bound means something: all experts would cost more.
        self.assertGreater(
            active * E / K, 1.1 * active + ROUTER + COMBINE + padding
        )


def _free_places(rows_of_experts):
    """Rows that may be computed although they are unused."""
    rows = int(rows_of_experts.sum())
    if keras.config.backend() == "jax":
        from keras_moe.backend.jax import block_sizes

        # A group's last block is full by half or more.
        return E * (block_sizes(rows, E)[0] // 2)
    if keras.config.backend() == "torch":
        # Of a batch of two experts or more, an eighth and 16 rows.
        return rows // 8 + E // 2 * 16
    return 0


def _flops_torch(layer, x):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class GroupedProducts(TorchDispatchMode):
        """PyTorch's FLOP counter does not know its own grouped product."""

        flops = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._grouped_mm.default:
                rows, matrices = args[0].shape[0], args[1].shape[1:]
                self.flops += 2 * rows * matrices.numel()
            return function(*args, **(kwargs or {}))

    known, grouped = FlopCounterMode(display=False), GroupedProducts()
    with known, grouped:
        layer(ops.convert_to_tensor(x))
    return known.get_total_flops() + grouped.flops


def _flops_tensorflow(layer, x):
    import tensorflow as tf

    total = tf.Variable(0, dtype=tf.int64, trainable=False)

    def counting(function, inner):
        def call(a, b, *args, **kwargs):
            out = function(a, b, *args, **kwargs)
            size = tf.size(out, tf.int64) * inner(a, kwargs)
            total.assign_add(2 * size)
            return out

        return call

    def inner(a, kwargs):
        axis = -2 if kwargs.get("transpose_a") else -1
        return tf.cast(tf.shape(a)[axis], tf.int64)

    matmul = counting(tf.matmul, inner)
    einsum = tf.einsum

    def counting_einsum(subscripts, a, b, **kwargs):
        # Only the einsum of `combine`: "tk,tkd->td".
        total.assign_add(2 * tf.size(b, tf.int64))
        return einsum(subscripts, a, b, **kwargs)

    with contextlib.ExitStack() as stack:
        for name in ("matmul", "linalg.matmul"):
            target = f"tensorflow.{name}"
            stack.enter_context(unittest.mock.patch(target, matmul))
        stack.enter_context(
            unittest.mock.patch("tensorflow.einsum", counting_einsum)
        )
        run = tf.function(lambda x: layer(x))
        run(tf.constant(x))
    kinds = _matmul_nodes(run.get_concrete_function(tf.constant(x)))
    assert kinds <= {"MatMul", "BatchMatMulV2", "Einsum"}, kinds
    return int(total)


def _matmul_nodes(concrete):
    graph = concrete.graph.as_graph_def()
    nodes = [n.op for n in graph.node]
    for function in graph.library.function:
        nodes += [n.op for n in function.node_def]
    return {op for op in nodes if "MatMul" in op or op in ("Einsum", "Conv2D")}


def _flops_jax(layer, x):
    import jax

    variables = [v.value for v in layer.trainable_variables]

    def forward(variables, x):
        return layer.stateless_call(variables, state, x)[0]

    state = [v.value for v in layer.non_trainable_variables]
    closed = jax.make_jaxpr(forward)(variables, x)
    flops = [0]
    _interpret(closed.jaxpr, closed.consts, [*variables, x], flops)
    return flops[0]


def _interpret(jaxpr, constants, arguments, flops):
    """Runs a jaxpr one primitive after the other, loops in Python."""
    from jax.extend.core import Literal

    values = {}

    def read(atom):
        if isinstance(atom, Literal):
            return atom.val
        return values[atom]

    values.update(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name, params = equation.primitive.name, equation.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if name == "while":
            outputs = _interpret_while(params, inputs, flops)
        elif inner is not None and hasattr(inner, "jaxpr"):
            outputs = _interpret(inner.jaxpr, inner.consts, inputs, flops)
        elif inner is not None:
            outputs = _interpret(inner, [], inputs, flops)
        else:
            if name in ("dot_general", "ragged_dot", "conv_general_dilated"):
                assert name == "dot_general", name
                flops[0] += _dot_flops(inputs, params["dimension_numbers"])
            outputs = equation.primitive.bind(*inputs, **params)
            if not equation.primitive.multiple_results:
                outputs = [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _interpret_while(params, inputs, flops):
    a, b = params["cond_nconsts"], params["body_nconsts"]
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    state = inputs[a + b :]
    while _interpret(
        condition.jaxpr, condition.consts, inputs[:a] + state, flops
    )[0]:
        state = _interpret(
            body.jaxpr, body.consts, inputs[a : a + b] + state, flops
        )
    return state


def _dot_flops(inputs, dimension_numbers):
    (_, contracted), (_, batch) = dimension_numbers
    lhs, rhs = inputs
    free = [
        n for i, n in enumerate(rhs.shape) if i not in (*contracted, *batch)
    ]
    return 2 * int(np.prod(lhs.shape) * np.prod(free))
