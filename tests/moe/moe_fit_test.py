"""`MoE` in `fit`: statistics, compiled steps, precision, rematerialization."""

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from keras_moe.routers import TopKRouter
from tests.moe.moe_test import SHAPE
from tests.moe.moe_test import inputs
from tests.moe.moe_test import make
from tests.test_case import TestCase


def model_with(*layers, dim=5):
    x = keras.Input((None, dim))
    y = x
    for layer in layers:
        y = layer(y)
    return keras.Model(x, keras.layers.Dense(1)(y))


def data(num_examples=12):
    x = inputs(shape=(num_examples, 4, 5))
    return x, x[..., :1]


# The router adds the only loss of some models here.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
class FitTest(TestCase):
    def test_losses_reach_the_router(self):
        # A model whose only loss comes from the layer.
        layer = MoE(
            num_experts=4,
            intermediate_dim=3,
            losses="load_balancing",
        )
        model = model_with(layer)
        model.compile(keras.optimizers.SGD(0.1), loss=None)
        before = ops.convert_to_numpy(layer.router.kernel).copy()
        loss = model.fit(data()[0], verbose=0).history["loss"][0]
        self.assertBetween(loss, 0.009, 0.02)
        self.assertNotAllClose(layer.router.kernel, before, atol=0, rtol=0)

    def test_balancing_spreads_the_load(self):
        # A router that begins with one favourite, and nothing else to learn.
        rng = np.random.default_rng(0)
        x = rng.normal(size=(128, 4, 5)).astype("float32") + 1.0
        loads = {}
        for weight in (0.0, 1.0):
            layer = make(top_k=1, losses=None, name="moe")
            layer.router.kernel.assign(
                0.3 * rng.normal(size=(5, 4)) + [[0.5, 0.0, 0.0, 0.0]] * 5
            )
            layer.routing_losses = [LoadBalancingLoss(weight)]
            model = model_with(layer)
            model.compile(keras.optimizers.Adam(0.02), loss=None)
            model.fit(x, batch_size=32, epochs=10, verbose=0)
            loads[weight] = layer.statistics.result()["expert_load"].max()
        self.assertGreater(loads[0.0], 0.7)
        self.assertLess(loads[1.0], 0.4)

    @pytest.mark.large  # a minute of compilation on torch
    @pytest.mark.filterwarnings("ignore")  # torch.compile has many to give
    def test_jit_compile(self):
        results = []
        for jit_compile in (True, False):
            keras.utils.set_random_seed(1)
            layer = make(capacity_factor=1.0, name="moe", experts="mlp")
            head = keras.layers.Dense(1, kernel_initializer="ones")
            x = keras.Input((None, 5))
            model = keras.Model(x, head(layer(x)))
            model.compile(
                keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile
            )
            history = model.fit(
                *data(), batch_size=6, shuffle=False, verbose=0
            ).history
            results.append(
                (history, [ops.convert_to_numpy(v) for v in model.weights])
            )
        (history, weights), (other_history, other_weights) = results
        self.assertEqual(set(history), set(other_history))
        for name, values in history.items():
            self.assertAllClose(values, other_history[name], atol=1e-5)
        for one, other in zip(weights, other_weights, strict=True):
            self.assertAllClose(one, other, atol=1e-5, rtol=1e-5)

    @parameterized.parameters("mixed_bfloat16", "mixed_float16")
    def test_mixed_precision(self, policy):
        x, y = data()
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            layer = MoE(
                num_experts=4,
                intermediate_dim=8,
                shared_experts=keras.layers.Dense(5),
                capacity_factor=1.5,
            )
            model = model_with(layer)
        finally:
            keras.config.set_dtype_policy(before)
        half = policy[len("mixed_") :]
        out = layer(ops.cast(x, half))
        self.assertEqual(keras.backend.standardize_dtype(out.dtype), half)
        for variable in layer.weights:
            self.assertEqual(
                keras.backend.standardize_dtype(variable.dtype), "float32"
            )
        self.assertEqual(layer.router.compute_dtype, "float32")
        self.assertEqual(layer.experts.compute_dtype, half)
        # The same numbers as in float32, as far as the half goes.
        full = MoE(
            num_experts=4,
            intermediate_dim=8,
            shared_experts=keras.layers.Dense(5),
            capacity_factor=1.5,
            dtype="float32",
        )
        full.build((None, None, 5))
        for new, old in zip(full.weights, layer.weights, strict=True):
            new.assign(old)
        self.assertAllClose(
            ops.cast(out, "float32"), full(x), atol=5e-2, rtol=5e-2
        )
        model.compile(keras.optimizers.Adam(0.01), "mse")
        # float16 begins with a loss scale that may skip the first steps.
        losses = model.fit(x, y, epochs=20, verbose=0).history["loss"]
        self.assertTrue(np.isfinite(losses).all())
        self.assertLess(losses[-1], losses[0])

    def test_unknown_batch_and_length(self):
        model = model_with(make(capacity_factor=1.25))
        self.assertEqual(model.output_shape, (None, None, 1))
        for shape in ((2, 7, 5), (5, 1, 5), (1, 3, 5)):
            out = model.predict(inputs(shape=shape), verbose=0)
            self.assertEqual(out.shape, (*shape[:2], 1))

    def test_remat_of_a_pure_function(self):
        layer = make(capacity_factor=1.0)
        trainable = [v.value for v in layer.trainable_variables]
        state = [v.value for v in layer.non_trainable_variables]
        state = [ops.copy(v) for v in state]
        x = ops.convert_to_tensor(inputs())

        def pure(x, *trainable):
            out, new_state, losses = layer.stateless_call(
                list(trainable), state, x, training=True, return_losses=True
            )
            return ops.sum(ops.square(out)) + sum(losses), new_state[0]

        plain = _value_and_gradients(pure, x, trainable)
        remat = _value_and_gradients(keras.remat(pure), x, trainable)
        for one, other in zip(plain, remat, strict=True):
            self.assertAllClose(one, other, atol=1e-6)
        # The state of the layer itself is as it was.
        self.assertIsNone(layer.statistics.result())

    def test_remat_scope(self):
        x, y = data()
        is_torch = keras.config.backend() == "torch"

        def fit(**kwargs):
            keras.utils.set_random_seed(0)
            with keras.RematScope("list_of_layers", layer_names=["moe"]):
                layer = MoE(4, 3, name="moe", **kwargs)
            model = model_with(layer)
            model.compile("sgd", "mse")
            return model.fit(x, y, verbose=0).history["loss"]

        if is_torch:
            keras.utils.set_random_seed(0)
            model = model_with(MoE(4, 3, name="moe"))
            model.compile("sgd", "mse")
            plain = model.fit(x, y, verbose=0).history["loss"]
            self.assertAllClose(fit(), plain, rtol=1e-6)
        # A bias that moves with each call would move twice.
        refused = [{"router": TopKRouter(4, expert_bias=True)}]
        for kwargs in refused if is_torch else [{}, *refused]:
            with self.assertRaisesRegex(Exception, "`keras.RematScope` cannot"):
                fit(**kwargs)

    def test_a_layer_inside_a_subclassed_model(self):
        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                # In a list, as blocks mostly are.
                self.blocks = [MoE(4, 3, statistics="per_expert")]
                self.head = keras.layers.Dense(1)

            def call(self, x, training=False):
                for block in self.blocks:
                    x = block(x, training=training)
                return self.head(x)

        # Built by its first `fit`.
        model = Model()
        model.compile("sgd", "mse")
        history = model.fit(*data(), epochs=2, verbose=0).history
        again = model.fit(*data(), epochs=2, verbose=0).history
        for logs in (history, again):
            self.assertAllClose(
                np.sum([logs[f"moe_load_{e}"] for e in range(4)], axis=0),
                [1.0, 1.0],
            )
            self.assertIn("routing_entropy", logs)

    def test_noise_is_reproducible(self):
        losses = []
        for _ in range(2):
            keras.utils.set_random_seed(3)
            layer = MoE(
                router=TopKRouter(4, 2, jitter=0.2, noise_stddev=0.5),
                experts="mlp",
                intermediate_dim=3,
            )
            model = model_with(layer)
            model.compile("sgd", "mse")
            history = model.fit(*data(), epochs=2, verbose=0).history
            losses.append(history["loss"])
        self.assertAllEqual(*losses)


def _value_and_gradients(pure, x, trainable):
    """Value, first state and gradients of `pure(x, *trainable)`."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        (value, state), gradients = jax.jit(
            jax.value_and_grad(
                pure, argnums=tuple(range(len(trainable) + 1)), has_aux=True
            )
        )(x, *trainable)
    elif backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def run(x, trainable):
            with tf.GradientTape() as tape:
                tape.watch((x, trainable))
                value, state = pure(x, *trainable)
            return value, state, tape.gradient(value, [x, *trainable])

        value, state, gradients = run(x, [tf.identity(v) for v in trainable])
    else:
        import torch

        leaves = [v.detach().clone().requires_grad_() for v in (x, *trainable)]
        value, state = pure(*leaves)
        gradients = torch.autograd.grad(value, leaves)
        value = value.detach()
    return [ops.convert_to_numpy(v) for v in (value, state, *gradients)]


assert SHAPE == (3, 4, 5)  # the masks above are made for it
