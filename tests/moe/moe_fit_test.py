"""`MoE` in `fit`: statistics, compiled steps, precision, rematerialization."""

import contextlib
import io
import re

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from keras_moe.routers import TopKRouter
from tests.moe.moe_test import MASK
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


class StatisticsTest(TestCase):
    def expected(self, layer, x, batch_size, mask=None):
        """Counts of the routing of all batches, dropped ones by hand."""
        load, dropped = np.zeros(layer.num_experts), 0
        entropy = []
        for i in range(0, len(x), batch_size):
            batch = x[i : i + batch_size]
            routing = layer.route(batch)
            indices = ops.convert_to_numpy(routing.expert_indices)
            probs = ops.convert_to_numpy(routing.probs)
            if mask is not None:
                keep = mask[i : i + batch_size].reshape(-1)
                indices, probs = indices[keep], probs[keep]
            counts = np.bincount(indices.reshape(-1), minlength=len(load))
            load += counts
            entropy.extend(-np.sum(probs * np.log(probs), axis=1))
            if layer.capacity.capacity_factor is not None:
                share = batch.shape[0] * batch.shape[1] * indices.shape[1]
                capacity = np.ceil(
                    share * layer.capacity.capacity_factor / len(load) - 1e-6
                )
                dropped += np.maximum(counts - capacity, 0).sum()
        return load, dropped / load.sum(), np.mean(entropy)

    @parameterized.parameters(None, 0.5)
    def test_logs_history_and_progress_bar(self, capacity_factor):
        layer = make(capacity_factor=capacity_factor, name="moe", top_k=1)
        model = model_with(layer)
        # With a learning rate of zero every epoch routes alike.
        model.compile(keras.optimizers.SGD(0.0), "mse")
        x, y = data()
        load, dropped, entropy = self.expected(layer, x, batch_size=8)
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen):
            history = model.fit(
                x,
                y,
                batch_size=8,  # the last batch is smaller
                epochs=2,
                shuffle=False,
                validation_data=(x[:3], y[:3]),
            ).history
        for epoch in range(2):
            self.assertAllClose(
                [history[f"moe_load_{e}"][epoch] for e in range(4)],
                load / load.sum(),
                rtol=1e-5,
            )
            self.assertAllClose(
                history["moe_dropped_fraction"][epoch], dropped, rtol=1e-5
            )
            self.assertAllClose(
                history["moe_routing_entropy"][epoch], entropy, rtol=1e-5
            )
            self.assertEqual(
                history["moe_dead_experts"][epoch], np.sum(load == 0)
            )
        # What is counted is training alone.
        self.assertEqual([k for k in history if k.startswith("val_moe")], [])
        # The line that stays on the screen has the numbers of the history.
        last = re.split(r"[\r\n]+", screen.getvalue().strip())[-1]
        shown = dict(re.findall(r"(moe_load_\d): ([-+.\de]+)", last))
        self.assertLen(shown, 4)
        for name, value in shown.items():
            self.assertAllClose(float(value), history[name][-1], atol=1e-4)
        # The last epoch can be read afterwards, validation or not.
        result = layer.statistics.result()
        self.assertAllClose(result["expert_load"], load / load.sum())
        self.assertAllClose(result["dropped_fraction"], dropped, rtol=1e-5)
        model.evaluate(x, y, verbose=0)
        model.predict(x, verbose=0)
        again = layer.statistics.result()
        self.assertAllEqual(again["expert_load"], result["expert_load"])

    def test_masked_tokens_do_not_count(self):
        layer = make(name="moe", capacity_factor=0.5)
        x = inputs()
        layer(x, mask=ops.array(MASK), training=True)
        load, dropped, entropy = self.expected(layer, x, 3, MASK)
        result = layer.statistics.result()
        self.assertAllClose(result["expert_load"] * load.sum(), load)
        self.assertAllClose(result["dropped_fraction"], dropped, rtol=1e-5)
        self.assertAllClose(result["routing_entropy"], entropy, rtol=1e-5)

    def test_dead_experts(self):
        layer = make(top_k=1)
        layer.router.kernel.assign(np.zeros((5, 4)))  # ties: expert 0
        layer(inputs(), training=True)
        result = layer.statistics.result()
        self.assertEqual(result["dead_experts"], 3)
        self.assertAllClose(result["expert_load"], [1, 0, 0, 0])
        self.assertAllClose(result["routing_entropy"], np.log(4), rtol=1e-6)

    def test_detail(self):
        x, y = data()
        for detail, num_experts, entries in (
            ("auto", 8, ["load_0", "load_7"]),
            ("auto", 9, ["load_min", "load_max"]),
            ("summary", 4, ["load_min", "load_max"]),
            ("per_expert", 9, ["load_0", "load_8"]),
            (None, 4, []),
        ):
            layer = MoE(num_experts, 4, statistics=detail, name="moe")
            model = model_with(layer)
            model.compile("sgd", "mse")
            history = model.fit(x, y, verbose=0).history
            for entry in entries:
                self.assertIn(f"moe_{entry}", history)
            if detail is None:
                self.assertEqual(list(history), ["loss"])
                self.assertEqual(layer.non_trainable_variables, [])

    def test_each_layer_has_its_own(self):
        model = model_with(MoE(2, 3, name="first"), MoE(2, 3, name="second"))
        model.compile("sgd", "mse")
        x, y = data()
        history = model.fit(x, y, verbose=0).history
        for name in ("first", "second"):
            total = history[f"{name}_load_0"][0] + history[f"{name}_load_1"][0]
            self.assertAllClose(total, 1.0)

    def test_equal_names_in_different_layers(self):
        class Block(keras.layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.moe = MoE(num_experts=2, intermediate_dim=3, name="moe")

            def build(self, input_shape):
                self.moe.build(input_shape)

            def call(self, x):
                return self.moe(x)

        model = model_with(Block(name="one"), Block(name="two"))
        model.compile("sgd", "mse")
        history = model.fit(*data(), verbose=0).history
        for name in ("one_moe_load_0", "two_moe_load_0"):
            self.assertIn(name, history)

    def test_a_second_call_in_inference_hides_nothing(self):
        # As a target network would be called.
        layer = MoE(num_experts=2, intermediate_dim=3, name="moe")
        x = keras.Input((None, 5))
        y = layer(x, training=True) + layer(x, training=False)
        model = keras.Model(x, keras.layers.Dense(1)(y))
        model.compile("sgd", "mse")
        history = model.fit(*data(), verbose=0).history
        self.assertAllClose(
            history["moe_load_0"][0] + history["moe_load_1"][0], 1.0
        )

    def test_inference_changes_no_state(self):
        layer = make()
        layer(inputs(), training=True)
        before = [ops.convert_to_numpy(v).copy() for v in layer.variables]
        layer(inputs(1))
        layer(inputs(1), training=False)
        for old, new in zip(before, layer.variables, strict=True):
            self.assertAllEqual(old, new)


# Some models here have no loss but that of the router.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
class FitTest(TestCase):
    def test_losses_reach_the_router(self):
        # A model whose only loss is that of the layer.
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
                *data(), batch_size=8, shuffle=False, epochs=2, verbose=0
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

    def test_a_layer_inside_a_subclassed_model(self):
        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.moe = MoE(num_experts=4, intermediate_dim=3, name="moe")
                self.head = keras.layers.Dense(1)

            def call(self, x, training=False):
                return self.head(self.moe(x, training=training))

        model = Model()
        model.compile("sgd", "mse")
        history = model.fit(*data(), epochs=2, verbose=0).history
        prefix = model.moe.statistics.prefix
        self.assertEndsWith(prefix, "_moe")
        self.assertAllClose(
            np.sum([history[f"{prefix}_load_{e}"] for e in range(4)], axis=0),
            [1.0, 1.0],
        )

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
