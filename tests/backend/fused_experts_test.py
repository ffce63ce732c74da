"""Every implementation of the fused experts against a NumPy loop."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import backend
from tests.test_case import TestCase

D, F, O = 8, 16, 12
# Tokens, choices of each, and rows of each group.
GROUPS = {
    "uneven": (20, 2, (17, 3, 12, 8)),
    "empty_first_and_last": (12, 2, (0, 20, 4, 0)),
    "one_group_has_all": (33, 1, (0, 0, 33, 0)),
    "rows_of_no_group": (20, 2, (5, 0, 9, 1)),
    "nothing_assigned": (16, 1, (0, 0, 0, 0)),
    "fewer_rows_than_groups": (1, 3, (1, 0, 1, 1)),
    "one_row": (1, 1, (0, 0, 1, 0)),
    "one_group": (50, 1, (50,)),
    "many_blocks": (350, 2, (300, 1, 0, 390)),
    "no_tokens": (0, 2, (0, 0, 0, 0)),
}
LAYERS = {
    "glu": (2, lambda gate, up: keras.activations.silu(gate) * up),
    "mlp": (1, keras.activations.gelu),
}
NAMES = tuple(backend.FUSED_EXPERTS)
TOLERANCE = {"float32": 1e-5, "bfloat16": 6e-2, "float16": 8e-3}


def operands(
    num_tokens, top_k, sizes, layers="glu", use_bias=False, dtype="float32"
):
    """Random arrays, rounded as `dtype` rounds them, as float64."""
    rng = np.random.default_rng(0)
    num_rows, num_groups = num_tokens * top_k, len(sizes)

    def draw(*shape):
        array = ops.cast(ops.array(rng.normal(size=shape)), dtype)
        return ops.convert_to_numpy(ops.cast(array, "float32")).astype(
            "float64"
        )

    row_weights = rng.uniform(size=num_rows).astype("float32").astype("float64")
    row_weights[sum(sizes) :] = 0
    shapes = [(D, F)] * LAYERS[layers][0] + [(F, O)]
    kernels = [draw(num_groups, *shape) / shape[0] ** 0.5 for shape in shapes]
    kernels = [
        ops.convert_to_numpy(
            ops.cast(ops.cast(ops.array(k), dtype), "float32")
        ).astype("float64")
        for k in kernels
    ]
    biases = [
        draw(num_groups, shape[1]) if use_bias else None for shape in shapes
    ]
    return {
        "tokens": draw(num_tokens, D),
        "row_weights": row_weights,
        "choices": rng.permutation(num_rows).astype("int32"),
        "sizes": np.array(sizes, "int32"),
        "kernels": kernels,
        "biases": biases,
        "d_out": draw(num_tokens, O),
    }


def _hidden(products, layers):
    """The hidden layer and its derivative by each product, in NumPy."""
    if layers == "glu":
        gate, up = products
        s = 1 / (1 + np.exp(-gate))
        return gate * s * up, [up * s * (1 + gate * (1 - s)), gate * s]
    # Keras' GELU is the exact one unless told otherwise.
    (x,) = products
    from math import erf

    phi = np.array([0.5 * (1 + erf(v / 2**0.5)) for v in x])
    density = np.exp(-x * x / 2) / (2 * np.pi) ** 0.5
    return x * phi, [phi + x * density]


def expected(
    tokens, row_weights, choices, sizes, kernels, biases, d_out, layers="glu"
):
    """Outputs and gradients, one row at a time in float64."""
    num_tokens = len(tokens)
    biases = [
        np.zeros((len(sizes), k.shape[2])) if b is None else b
        for k, b in zip(kernels, biases, strict=True)
    ]
    out = np.zeros((num_tokens, O))
    d_tokens, d_weights = np.zeros_like(tokens), np.zeros_like(row_weights)
    d_kernels = [np.zeros_like(k) for k in kernels]
    d_biases = [np.zeros_like(b) for b in biases]
    for n, g in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        t = choices[n] % num_tokens
        x, w = tokens[t], row_weights[n]
        products = [
            x @ k[g] + b[g]
            for k, b in zip(kernels[:-1], biases[:-1], strict=True)
        ]
        h, slopes = _hidden(products, layers)
        y = h @ kernels[-1][g] + biases[-1][g]
        out[t] += w * y
        d_weights[n] = d_out[t] @ y
        dy = w * d_out[t]
        d_kernels[-1][g] += np.outer(h, dy)
        d_biases[-1][g] += dy
        dh = kernels[-1][g] @ dy
        for i, slope in enumerate(slopes):
            d_product = dh * slope
            d_kernels[i][g] += np.outer(x, d_product)
            d_biases[i][g] += d_product
            d_tokens[t] += kernels[i][g] @ d_product
    return out, d_tokens, d_weights, d_kernels, d_biases


def run(
    name,
    tokens,
    row_weights,
    choices,
    sizes,
    kernels,
    biases,
    d_out,
    layers="glu",
    dtype="float32",
    jit=False,
    weights_dtype="float32",
):
    """Outputs and gradients of the library, as float32 arrays."""
    fused, hidden = backend.FUSED_EXPERTS[name], LAYERS[layers][1]
    to = lambda a: ops.cast(ops.array(a), dtype)
    use_bias = biases[0] is not None
    choices, sizes = ops.array(choices, "int32"), ops.array(sizes, "int32")
    d_out = to(d_out)
    inputs = (
        to(tokens),
        ops.cast(ops.array(row_weights), weights_dtype),
        *map(to, kernels),
        *(map(to, biases) if use_bias else ()),
    )

    def call(choices, sizes, tokens, row_weights, *weights):
        split = len(kernels)
        given = weights[split:] if use_bias else (None,) * split
        return fused(
            tokens,
            row_weights,
            choices,
            sizes,
            tuple(weights[:split]),
            tuple(given),
            hidden,
        )

    if keras.config.backend() == "jax":
        import jax

        def both(choices, sizes, d_out, *inputs):
            out, pull = jax.vjp(lambda *a: call(choices, sizes, *a), *inputs)
            return out, *pull(d_out)

        both = jax.jit(both) if jit else both
        results = both(choices, sizes, d_out, *inputs)
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        def both(choices, sizes, d_out, *inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                out = call(choices, sizes, *inputs)
            return out, *tape.gradient(out, inputs, output_gradients=d_out)

        if jit:
            both = tf.function(both, jit_compile=jit == "xla")
        results = both(choices, sizes, d_out, *inputs)
    else:
        import torch

        inputs = [x.clone().requires_grad_() for x in inputs]
        out = call(choices, sizes, *inputs)
        results = out.detach(), *torch.autograd.grad(out, inputs, d_out)
    results = [ops.convert_to_numpy(ops.cast(r, "float32")) for r in results]
    split = 3 + len(kernels)
    return *results[:3], results[3:split], results[split:]


MODES = {"jax": (False, True), "tensorflow": (False, True), "torch": (False,)}
MODES_OF = {
    ("tensorflow", "row_blocks"): (False, "xla"),
}


def modes(name):
    known = MODES[keras.config.backend()]
    return MODES_OF.get((keras.config.backend(), name), known)


class FusedExpertsTest(TestCase):
    def check(self, actual, wanted, tolerance, use_bias=False):
        for a, w in zip(actual[:3], wanted[:3], strict=True):
            self.assert_relative(a, w, tolerance)
        for a, w in zip(actual[3], wanted[3], strict=True):
            self.assert_relative(a, w, tolerance)
        self.assertEqual(len(actual[4]), len(wanted[4]) if use_bias else 0)
        for a, w in zip(actual[4], wanted[4], strict=False):
            self.assert_relative(a, w, tolerance)

    def test_there_is_one(self):
        self.assertNotEmpty(NAMES)

    @parameterized.named_parameters(
        (f"{name}_{group}", name, *GROUPS[group])
        for name in NAMES
        for group in GROUPS
    )
    def test_outputs_and_gradients(self, name, num_tokens, top_k, sizes):
        for layers, use_bias in (("glu", False), ("mlp", True)):
            arrays = operands(num_tokens, top_k, sizes, layers, use_bias)
            wanted = expected(**arrays, layers=layers)
            for jit in modes(name):
                actual = run(name, **arrays, layers=layers, jit=jit)
                self.check(actual, wanted, 1e-5, use_bias)

    @parameterized.named_parameters(
        (f"{name}_{dtype}", name, dtype)
        for name in NAMES
        for dtype in TOLERANCE
    )
    def test_dtypes(self, name, dtype):
        arrays = operands(*GROUPS["uneven"], dtype=dtype)
        actual = run(name, **arrays, dtype=dtype, jit=modes(name)[-1])
        self.check(actual, expected(**arrays), TOLERANCE[dtype])

    @parameterized.named_parameters((name, name) for name in NAMES)
    def test_float64(self, name):
        if keras.config.backend() == "jax":
            self.skipTest("JAX has float64 in its x64 mode only")
        arrays = operands(*GROUPS["uneven"], use_bias=True, layers="mlp")
        actual = run(
            name,
            **arrays,
            layers="mlp",
            dtype="float64",
            weights_dtype="float64",
            jit=modes(name)[-1],
        )
        self.check(actual, expected(**arrays, layers="mlp"), 1e-6, True)

    @parameterized.named_parameters((name, name) for name in NAMES)
    def test_nan_stays_with_its_token_and_expert(self, name):
        """Neither other tokens nor the weights of other experts see it."""
        num_tokens, top_k, sizes = 6, 1, (2, 3, 0)  # and an unused row
        arrays = operands(num_tokens, top_k, sizes)
        arrays["choices"] = np.arange(6, dtype="int32")
        wanted = expected(**arrays)
        arrays["tokens"][[1, 5]] = np.nan  # of expert 0, and unused
        for jit in modes(name):
            out, d_tokens, d_weights, d_kernels, _ = run(
                name, **arrays, jit=jit
            )
            for actual, exact in (
                (out, wanted[0]),
                (d_tokens, wanted[1]),
                (d_weights, wanted[2]),
            ):
                self.assertTrue(np.isnan(actual[1]).any())
                sound = [0, 2, 3, 4, 5]
                self.assert_relative(actual[sound], exact[sound], 1e-5)
            for actual, exact in zip(d_kernels, wanted[3], strict=True):
                self.assertTrue(np.isnan(actual[0]).any())
                self.assert_relative(actual[1:], exact[1:], 1e-5)

    @parameterized.named_parameters((name, name) for name in NAMES)
    def test_a_token_twice_at_one_expert(self, name):
        """Nothing forbids a routing to say so."""
        arrays = operands(4, 2, (8,))
        for jit in modes(name):
            self.check(run(name, **arrays, jit=jit), expected(**arrays), 1e-5)

    @parameterized.named_parameters((name, name) for name in NAMES)
    def test_same_result_each_time(self, name):
        arrays = operands(350, 2, (300, 1, 0, 390))
        first, second = (
            run(name, **arrays, jit=modes(name)[-1]) for _ in range(2)
        )
        for a, b in zip(first[:3], second[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(first[3], second[3], strict=True):
            np.testing.assert_array_equal(a, b)
