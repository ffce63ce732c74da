"""`SoftMoE` against a NumPy loop, and inside models."""

import os

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import Experts
from keras_moe.experts import GLUExperts
from keras_moe.experts import MLPExperts
from keras_moe.moe.soft_moe import SoftMoE
from keras_moe.routers.soft_router import SoftRouter
from tests import token_loop
from tests.routers.soft_router_test import MASK
from tests.routers.soft_router_test import SHAPE
from tests.routers.soft_router_test import inputs
from tests.routers.soft_router_test import soft_routing
from tests.test_case import TestCase


class WiderExperts(Experts):
    """Linear experts that say how wide they are, or say something else."""

    def __init__(self, num_experts, width, said=None, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.width = width
        self.said = said or width

    def build(self, rows_shape):
        self.kernel = self.add_bank("kernel", (rows_shape[-1], self.width))

    def call(self, rows, group_sizes, training=None):
        return self.grouped_dense(rows, group_sizes, self.kernel)

    def compute_output_shape(self, rows_shape, group_sizes_shape=None):
        return (rows_shape[0], self.said)


def make(experts="glu", activation="silu", dtype=None, **kwargs):
    """3 experts of width 2, with 2 slots each."""
    router = {k: kwargs.pop(k) for k in list(kwargs) if k != "name"}
    if isinstance(experts, str):
        cls = {"glu": GLUExperts, "mlp": MLPExperts}[experts]
        experts = cls(
            3,
            2,
            activation=activation,
            kernel_initializer=keras.initializers.GlorotUniform(seed=2),
            bias_initializer=keras.initializers.RandomNormal(0.5, seed=3),
            name="experts",
            dtype=dtype,
        )
    layer = SoftMoE(
        router=SoftRouter(
            3,
            kernel_initializer=keras.initializers.RandomNormal(seed=1),
            scale_initializer=keras.initializers.Constant(2.0),
            name="router",
            dtype=dtype,
            **{"slots_per_expert": 2, **router},
        ),
        experts=experts,
        dtype=dtype,
        **kwargs,
    )
    layer.build((None, None, SHAPE[-1]))
    return layer


def weights_of(layer):
    return {
        v.path.split("/", 1)[1]: ops.convert_to_numpy(v).astype("float64")
        for v in layer.trainable_variables
    }


def soft_moe(x, weights, mask=None, activation="silu", **routing):
    """Outputs of `(B, L, D)`, one slot after the other."""
    _, dispatch, combine, mixed = soft_routing(x, weights, mask, **routing)
    outputs = 0.0
    for b, e, p in np.ndindex(x.shape[0], *dispatch.shape[2:]):
        slot = np.zeros(x.shape[2])
        for t in range(x.shape[1]):
            slot += dispatch[b, t, e, p] * mixed[b, t]
        if "experts/kernel" in weights:
            row = slot @ weights["experts/kernel"][e]
            row = row + weights.get("experts/bias", np.zeros((9, 1)))[e]
        else:
            row = token_loop.expert(slot, weights, e, activation)
        if np.ndim(outputs) == 0:
            outputs = np.zeros((*x.shape[:2], row.size))
        for t in range(x.shape[1]):
            outputs[b, t] += combine[b, t, e, p] * row
    return outputs


class LoopTest(TestCase):
    """Outputs and all gradients."""

    @parameterized.named_parameters(
        ("glu", {}, {}),
        (
            "mlp_masked_one_slot",
            {"experts": "mlp", "activation": "tanh", "slots_per_expert": 1},
            {"activation": "tanh", "mask": MASK},
        ),
        (
            "rms",
            {"normalization": "rms", "mix_normalized": True},
            {"kind": "rms", "mixed": True},
        ),
        (
            "layer_masked",
            {"normalization": "layer", "mix_normalized": True, "epsilon": 0.1},
            {"kind": "layer", "mixed": True, "epsilon": 0.1, "mask": MASK},
        ),
    )
    def test_outputs_and_gradients(self, kwargs, loop):
        layer = make(**kwargs)
        x, cotangent = inputs(), inputs(1)

        def forward(arrays):
            return soft_moe(arrays["x"], arrays, **loop)

        arrays = {"x": x.astype("float64"), **weights_of(layer)}
        gradients = token_loop.gradients(
            lambda arrays: np.sum(forward(arrays) * cotangent), arrays
        )
        mask = loop.get("mask")
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer,
            x,
            cotangent,
            training=True,
            mask=None if mask is None else ops.array(mask),
        )
        self.assert_relative(outputs, forward(arrays))
        self.assert_relative(d_inputs, gradients.pop("x"))
        self.assertEqual(set(d_weights), set(gradients))
        for name, gradient in d_weights.items():
            self.assert_relative(gradient, gradients[name])
            self.assertGreater(np.abs(gradients[name]).max(), 1e-3, name)

    def test_another_width(self):
        for width in (3, 8):
            layer = make(WiderExperts(3, width, name="experts"))
            weights = weights_of(layer)
            outputs = layer(inputs())
            self.assert_relative(outputs, soft_moe(inputs(), weights))
            self.assertEqual(
                layer.compute_output_shape((None, 7, 5)), (None, 7, width)
            )
            self.assertEqual(layer(keras.Input((7, 5))).shape, (None, 7, width))

    def test_route(self):
        layer = make()
        routing = layer.route(inputs().reshape(2, 2, 2, 5))
        wanted = soft_routing(inputs(), weights_of(layer))
        for actual, expected in zip(routing, wanted, strict=True):
            self.assert_relative(actual, expected)
        fresh = SoftMoE(num_experts=2, intermediate_dim=2)
        self.assertLen(fresh.route(inputs().tolist()), 4)


class ModelTest(TestCase):
    def test_inside_a_users_layer(self):
        # On JAX, Keras infers its shapes with symbolic sizes.
        class Block(keras.layers.Layer):
            def __init__(self, moe):
                super().__init__()
                self.moe = moe

            def build(self, input_shape):
                self.moe.build(input_shape)

            def call(self, x, mask=None):
                return x + self.moe(x, mask=mask)

        for shape in ((4, 5), (None, 5), (None, 3, 5), (None, None, 5)):
            x = keras.Input(shape)
            moe = SoftMoE(num_experts=3, intermediate_dim=2, slots_per_expert=2)
            model = keras.Model(x, Block(moe)(x))
            self.assertEqual(model.output_shape, (None, *shape))
        for shape in ((2, 3, 4, 5), (1, 4, 2, 5)):
            outputs = model(inputs(shape=shape))
            self.assertEqual(tuple(outputs.shape), shape)

    def test_save_and_load(self):
        x = keras.Input((None, 5))
        y = SoftMoE(num_experts=3, intermediate_dim=2, name="first")(x)
        second = SoftMoE(
            router=SoftRouter(3, 2, "rms", gumbel_noise=0.1, name="router"),
            experts=MLPExperts(3, 2, name="experts"),
            name="second",
        )
        model = keras.Model(x, second(y))
        model.compile("adam", "mse")
        model.fit(inputs(), inputs(1), verbose=0)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.models.load_model(path)
        self.assertAllEqual(loaded(inputs()), model(inputs()))
        paths = [v.path for v in loaded.weights]
        self.assertEqual(paths, [v.path for v in model.weights])
        self.assertIn("first/router/slot_kernel", paths)
        self.assertIn("second/router/token_gain", paths)
        self.assertIn("second/experts/up_bias", paths)
        # Another length than the one it was trained on.
        self.assertEqual(
            loaded.predict(inputs(shape=(2, 9, 5)), verbose=0).shape, (2, 9, 5)
        )

    @parameterized.parameters("float32", "mixed_float16", "mixed_bfloat16")
    def test_fit_learns(self, dtype):
        # Replace each token by the mean of its example: it takes other tokens.
        x = inputs(shape=(64, 6, 4))
        y = np.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
        layer = SoftMoE(
            num_experts=2,
            intermediate_dim=16,
            router=SoftRouter(2, noise_stddev=0.01, name="router", dtype=dtype),
            dtype=dtype,
        )
        model = keras.Sequential([layer])
        jit = dtype == "float32" and keras.config.backend() != "torch"
        model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile=jit)
        router = layer.router
        before = float(np.mean(y**2))
        losses = model.fit(x, y, epochs=30, batch_size=32, verbose=0).history
        self.assertLess(losses["loss"][-1], before / 4)
        self.assertNotAllClose(router.scale, 1.0, atol=1e-3)
        self.assertEqual(layer.losses, [])

    @pytest.mark.skipif(
        keras.config.backend() == "torch", reason="torch has no XLA"
    )
    def test_compiled(self):
        layer = make("mlp")
        model = keras.Sequential([keras.Input((None, 5)), layer])
        model.compile(jit_compile=True)
        outputs = model.predict(inputs(), verbose=0)
        self.assert_relative(outputs, soft_moe(inputs(), weights_of(layer)))
