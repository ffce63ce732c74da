"""Plans of one device, against what JAX and its compiler say of the program."""

import keras
import numpy as np
import pytest

from keras_moe.distribution import plan
from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter
from tests.test_case import TestCase

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "jax", reason="asks the compiler of JAX"
)
BATCH, LENGTH, VOCABULARY, DIM, HEADS = 4, 32, 100, 128, 4


def transformer(feed_forward):
    """Two blocks and a head on token ids, with its inputs."""
    ids = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, DIM)(ids)
    for _ in range(2):
        h = keras.layers.LayerNormalization()(x)
        x += keras.layers.MultiHeadAttention(HEADS, DIM // HEADS)(h, h)
        h = keras.layers.LayerNormalization()(x)
        x += feed_forward(h)
    model = keras.Model(ids, keras.layers.Dense(VOCABULARY)(x))
    rng = np.random.default_rng(0)
    return model, rng.integers(0, VOCABULARY, (BATCH, LENGTH))


def dense(x):
    hidden = keras.layers.Dense(4 * DIM, activation="relu")(x)
    return keras.layers.Dense(DIM)(hidden)


def sparse(implementation):
    def bank(num_experts):
        return GLUExperts(num_experts, 192, implementation=implementation)

    return lambda x: MoE(
        router=TopKRouter(8, 2),
        experts=bank(8),
        shared_experts=bank(1),
        losses=None,
        statistics=None,
    )(x)


def forward_and_loss(model):
    import jax

    state = [v.value for v in model.non_trainable_variables]

    def forward(weights, ids):
        return model.stateless_call(weights, state, ids)[0]

    def loss(weights, ids):
        return -jax.nn.log_softmax(forward(weights, ids))[..., 0].sum()

    return [v.value for v in model.trainable_variables], forward, loss


def products(jaxpr):
    """Two for each multiplication of the matrix products of a program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = np.prod([shape[axis] for axis in contracted])
            total += 2 * inner * np.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += products(inner)
    return total


class CompilerTest(TestCase):
    def test_cost_of_dense_blocks(self):
        import jax

        model, ids = transformer(dense)
        weights, forward, loss = forward_and_loss(model)
        result = plan(model, {}, BATCH, sequence_length=LENGTH)
        for function, expected in (
            (forward, result.flops / 3),
            (jax.grad(loss), result.flops),
        ):
            compiled = jax.jit(function).lower(weights, ids).compile()
            flops = compiled.cost_analysis()["flops"]
            self.assertAllClose(flops / expected, 1.0, atol=0.1)
        # Weights, ids (and nothing else) come in, gradients go out.
        memory = compiled.memory_analysis()
        arguments = result.weights + ids.size * 4
        self.assertAllClose(
            memory.argument_size_in_bytes / arguments, 1.0, atol=0.01
        )
        self.assertAllClose(
            memory.output_size_in_bytes / result.gradients, 1.0, atol=0.01
        )

    def test_products_of_sparse_blocks(self):
        import jax

        # This implementation has no loops, whose rounds nobody counts.
        model, ids = transformer(sparse("reference"))
        weights, forward, _ = forward_and_loss(model)
        result = plan(model, {}, BATCH)
        self.assertEqual(result.tokens, BATCH * LENGTH)
        counted = products(jax.make_jaxpr(forward)(weights, ids).jaxpr)
        planned = result.flops_per_token * result.tokens
        self.assertAllClose(counted / planned, 1.0, atol=0.01)

    def test_kept_for_the_backward_pass(self):
        import jax

        model, ids = transformer(sparse(None))
        weights, _, loss = forward_and_loss(model)
        _, backward = jax.vjp(lambda weights: loss(weights, ids), weights)
        seen = {id(w) for w in weights}
        kept = 0
        for value in jax.tree.leaves(backward):
            if id(value) not in seen:
                seen.add(id(value))
                kept += value.nbytes
        # Without the attention's scores, which the plan leaves out.
        scores = 2 * 2 * BATCH * HEADS * LENGTH**2 * 4
        result = plan(model, {}, BATCH)
        self.assertAllClose(result.activations / (kept - scores), 1.0, atol=0.1)
