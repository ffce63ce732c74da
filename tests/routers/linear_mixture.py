"""What the tests of several routers need: a mixture of all linear experts,
weighted as a router says, and routers as the backend's compilers run them.
"""

import keras
import numpy as np
from keras import ops


def combine_matrix(routing, num_experts):
    """`(T, E)`: the weight of each expert for each token."""
    expert = ops.arange(num_experts, dtype="int32")
    chosen = ops.expand_dims(routing.expert_indices, -1) == expert  # (T, K, E)
    weights = ops.expand_dims(routing.expert_weights, -1)
    return ops.sum(ops.where(chosen, weights, ops.zeros_like(weights)), axis=1)


class LinearMixture(keras.layers.Layer):
    """`y[t] = sum over e of combine[t, e] * (x[t] @ W[e] + b[e])`."""

    def __init__(self, router, kernel, bias, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.router = router
        for name, value in (("kernel", kernel), ("bias", bias)):
            weight = self.add_weight(name=f"expert_{name}", shape=value.shape)
            weight.assign(value)
            setattr(self, f"expert_{name}", weight)
        self.built = router.built

    def call(
        self,
        tokens,
        mask=None,
        training=None,
        num_sequences=None,
        context=None,
    ):
        more = {"num_sequences": num_sequences, "context": context}
        more = {k: v for k, v in more.items() if v is not None}
        routing = self.router(tokens, mask=mask, training=training, **more)
        if mask is not None:
            keep = ops.expand_dims(ops.convert_to_tensor(mask), -1)
            tokens = ops.where(keep, tokens, ops.zeros_like(tokens))
        rows = ops.einsum("td,edf->tef", tokens, self.expert_kernel)
        rows = rows + self.expert_bias
        combine = combine_matrix(routing, self.router.num_experts)
        return ops.einsum("te,tef->tf", combine, rows)


def numpy_mixture(combine, x, kernel, bias):
    y = np.zeros((len(x), kernel.shape[-1]))
    for t, e in np.argwhere(combine):
        y[t] += combine[t, e] * (x[t] @ kernel[e] + bias[e])
    return y


def router_gradient(gradients, name="kernel"):
    """The gradient of the router's kernel, wherever it was built."""
    (found,) = (
        value
        for path, value in gradients.items()
        if path.split("/")[-1] == name
    )
    return found


def to_numpy(routing):
    return type(routing)(*(ops.convert_to_numpy(field) for field in routing))


def compilers():
    """Functions that compile a function of tensors, on this backend."""
    if keras.config.backend() == "jax":
        import jax

        return {"jit": jax.jit}
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        def unknown_sizes(function):
            def call(x):
                shape = [None] * len(x.shape[:-1]) + [x.shape[-1]]
                spec = tf.TensorSpec(shape, x.dtype)
                return tf.function(function, input_signature=[spec])(x)

            return call

        return {
            "xla": lambda function: tf.function(function, jit_compile=True),
            "unknown_sizes": unknown_sizes,
        }
    return {}


class Sequences(keras.layers.Layer):
    """The combine matrices of a batch of sequences, `(B, L, E)`."""

    def __init__(self, router, **kwargs):
        super().__init__(**kwargs)
        self.router = router

    def call(self, inputs, training=None):
        batch, length, dim = ops.shape(inputs)
        routing = self.router(
            ops.reshape(inputs, (-1, dim)),
            training=training,
            num_sequences=batch,
        )
        combine = combine_matrix(routing, self.router.num_experts)
        return ops.reshape(combine, (batch, length, self.router.num_experts))


class RouterChecks:
    """Tests that hold for every router.

    A test class has `make(**kwargs)`, a router of `num_experts` 4 that takes
    tokens of width 6, and `context`, its arguments for 12 tokens.
    """

    context = {}

    def tokens(self, num_tokens=12):
        rng = np.random.default_rng(1)
        return rng.normal(size=(num_tokens, 6)).astype("float32")

    def contexts(self, num_tokens):
        return {k: v[:num_tokens] for k, v in self.context.items()}

    def test_float32_in_every_policy(self):
        for policy in ("mixed_float16", "bfloat16"):
            router = self.make(dtype=policy)
            tokens = ops.cast(self.tokens(), "float16")
            routing = router(tokens, training=True, **self.context)
            for name, field in routing._asdict().items():
                dtype = keras.backend.standardize_dtype(field.dtype)
                integers = name == "expert_indices"
                self.assertEqual(dtype, "int32" if integers else "float32")
            for weight in router.trainable_weights:
                self.assertEqual(weight.dtype, "float32")

    def test_degenerate(self):
        for num_tokens, masked in ((1, False), (0, False), (12, True)):
            mask = np.zeros(num_tokens, bool) if masked else None
            for training in (False, True):
                routing = self.make()(
                    self.tokens(num_tokens),
                    mask=mask,
                    training=training,
                    **self.contexts(num_tokens),
                )
                routing = to_numpy(routing)
                for field in routing:
                    self.assertEqual(len(field), num_tokens)
                    self.assertTrue(np.isfinite(field).all())

    def test_masked_nan_reaches_nothing(self):
        rng = np.random.default_rng(5)
        kernel, bias = rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 3))
        layer = LinearMixture(self.make(), kernel, bias)
        mask = np.array([True, False, True, True] * 3)
        tokens, zeros = self.tokens(), self.tokens()
        tokens[~mask], zeros[~mask] = np.nan, 0.0
        cotangent = rng.normal(size=(12, 3)) * mask[:, None]
        layer(zeros, mask=mask, **self.context)  # builds it
        results = [
            self.outputs_and_gradients(
                layer, x, cotangent, mask=mask, **self.context
            )
            for x in (tokens, zeros)
        ]
        (y, dx, dw), (y0, dx0, dw0) = results
        self.assertAllClose(y[mask], y0[mask])
        self.assertTrue(np.isfinite(y).all())
        self.assertAllClose(dx, dx0)
        self.assertAllEqual(dx[~mask], np.zeros((3, 6)))
        for name, gradient in dw.items():
            self.assertAllClose(gradient, dw0[name])

    def test_compiled(self):
        router = self.make()
        tokens = self.tokens()
        router.build((None, 6))
        for training in (False, True):

            def run(x, training=training):
                routing = router(x, training=training, **self.context)
                return tuple(routing)

            eager = [ops.convert_to_numpy(x) for x in run(ops.array(tokens))]
            for compiled in compilers().values():
                fields = compiled(run)(ops.array(tokens))
                for a, b in zip(fields, eager, strict=True):
                    self.assert_relative(a, b)
