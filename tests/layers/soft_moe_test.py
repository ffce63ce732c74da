"""`SoftMoE` against a NumPy loop; masks, ranks, saving, `fit`, counts."""

import os
from unittest import mock

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import Experts
from keras_moe.experts import GLUExperts
from keras_moe.experts import MLPExperts
from keras_moe.layers.soft_moe import SoftMoE
from keras_moe.routers import TopKRouter
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
        self.assertLen(fresh.route(inputs()), 4)


class BehaviourTest(TestCase):
    def test_permuted_tokens_permute_the_output(self):
        layer, x = make(), inputs()
        order = [2, 0, 3, 1]
        outputs = ops.convert_to_numpy(layer(x))
        self.assertAllClose(layer(x[:, order]), outputs[:, order], atol=1e-6)
        self.assertNotAllClose(outputs[:, order], outputs)

    def test_examples_do_not_touch_each_other(self):
        layer, x = make(), inputs()
        outputs = ops.convert_to_numpy(layer(x))
        x[1, 2, 3] = np.nan
        spoilt = ops.convert_to_numpy(layer(x))
        self.assertAllClose(spoilt[0], outputs[0], atol=1e-6)
        self.assertTrue(np.isnan(spoilt[1]).all())

    def test_masked_tokens_change_nothing(self):
        layer = make("mlp")
        alone = self.outputs_and_gradients(layer, inputs())
        mask = np.arange(7) < 4
        for junk in (0.0, 1e3, np.nan):
            x = np.full((2, 7, 5), junk, "float32")
            x[:, :4] = inputs()
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                layer, x, mask=ops.array(np.stack([mask, mask]))
            )
            self.assertAllClose(outputs[:, :4], alone[0], atol=1e-6)
            self.assertAllClose(d_inputs[:, :4], alone[1], atol=1e-5)
            self.assertAllEqual(outputs[:, 4:], np.zeros((2, 3, 5)))
            self.assertAllEqual(d_inputs[:, 4:], np.zeros((2, 3, 5)))
            for name, gradient in d_weights.items():
                self.assertAllClose(gradient, alone[2][name], atol=1e-5)

    def test_all_masked_and_empty(self):
        layer = make("mlp")
        x = np.full(SHAPE, np.nan, "float32")
        x[1] = inputs()[1]
        mask = np.repeat([[False], [True]], 4, axis=1)
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer, x, mask=ops.array(mask)
        )
        self.assertAllEqual(outputs[0], np.zeros((4, 5)))
        self.assertAllClose(outputs[1], layer(inputs())[1], atol=1e-6)
        self.assertAllEqual(d_inputs[0], np.zeros((4, 5)))
        for gradient in d_weights.values():
            self.assertTrue(np.isfinite(gradient).all())
        for shape in ((0, 4, 5), (2, 3, 0, 5)):
            outputs = layer(np.zeros(shape, "float32"))
            self.assertEqual(tuple(outputs.shape), shape)

    def test_one_token_one_expert_one_slot(self):
        layer = SoftMoE(num_experts=1, intermediate_dim=3)
        x = inputs(shape=(2, 1, 5))
        rows = layer(x)
        alone = layer.experts(x[:, 0], ops.array([2], "int32"))
        self.assertAllClose(rows[:, 0], alone, atol=1e-6)

    def test_positions_of_an_image(self):
        layer = make()
        x = inputs(shape=(2, 2, 3, 5))
        flat = x.reshape(2, 6, 5)
        self.assertAllClose(
            layer(x), ops.reshape(layer(flat), x.shape), atol=1e-6
        )
        mask = np.array([[True, False], [True, True]])  # whole lines
        outputs = ops.convert_to_numpy(layer(x, mask=ops.array(mask)))
        full = np.repeat(mask, 3, axis=1)
        self.assertAllClose(
            outputs.reshape(2, 6, 5), layer(flat, mask=ops.array(full))
        )
        self.assertAllEqual(outputs[0, 1], np.zeros((3, 5)))
        self.assertGreater(np.abs(outputs[mask]).min(), 0)

    def test_mask_arrives_from_an_embedding_and_passes_on(self):
        model = keras.Sequential(
            [
                keras.layers.Embedding(10, 8, mask_zero=True),
                SoftMoE(num_experts=3, intermediate_dim=2),
                keras.layers.GlobalAveragePooling1D(),
            ]
        )
        short = model.predict(np.array([[3, 4]]), verbose=0)
        padded = model.predict(np.array([[3, 4, 0, 0, 0]]), verbose=0)
        self.assertAllClose(short, padded, atol=1e-6)

    def test_integer_inputs(self):
        x = np.arange(40).reshape(SHAPE) % 3
        self.assertAllClose(make()(x), make()(x.astype("float32")))

    @parameterized.parameters("mixed_float16", "mixed_bfloat16", "float64")
    def test_precision(self, dtype):
        if dtype == "float64" and keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 unless told so as it starts.")
        layer = make(dtype=dtype)
        outputs = layer(inputs())
        self.assertDType(outputs, layer.compute_dtype)
        wanted = soft_moe(inputs(), weights_of(layer))
        tolerance = {"f": 3e-3, "b": 3e-2}[layer.compute_dtype[0]]
        tolerance = 1e-9 if dtype == "float64" else tolerance
        outputs = ops.convert_to_numpy(outputs).astype("float64")
        self.assert_relative(outputs, wanted, tolerance)

    def test_mixes_in_float32(self):
        # 4096 weights of 1 / 4096, and no operand in half precision.
        layer = make(dtype="mixed_float16")
        x = np.repeat(inputs(shape=(1, 1, 5)), 4096, axis=1) + 1
        with mock.patch.object(ops, "einsum", wraps=ops.einsum) as einsum:
            outputs = layer(x)
        mixed = [c.args[1:] for c in einsum.mock_calls if "ebpd" in c.args[0]]
        self.assertLen(mixed, 2)
        for operand in (*mixed[0], *mixed[1]):
            self.assertDType(operand, "float32")
        outputs = ops.convert_to_numpy(outputs).astype("float32")
        one = soft_moe(x[:, :1], weights_of(layer))
        self.assertAllClose(outputs[:, :1], one, atol=3e-3)
        self.assertAllEqual(outputs, np.repeat(outputs[:, :1], 4096, axis=1))


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


class ConfigTest(TestCase):
    def test_short_and_long_form(self):
        layer = SoftMoE(
            num_experts=6,
            intermediate_dim=7,
            slots_per_expert=3,
            activation="relu",
            experts="mlp",
        )
        self.assertEqual(layer.router.slots_per_expert, 3)
        self.assertEqual(layer.num_experts, 6)
        self.assertIsInstance(layer.experts, MLPExperts)
        self.assertEqual(layer.experts.intermediate_dim, 7)
        self.assertEqual(layer.experts.activation, keras.activations.relu)
        layer = SoftMoE(router=SoftRouter(5), intermediate_dim=7)
        self.assertEqual(layer.experts.num_experts, 5)
        layer = SoftMoE(experts=GLUExperts(4, 2))
        self.assertEqual(layer.router.num_experts, 4)
        self.assertEqual(layer.router.slots_per_expert, 1)

    def test_layer_contract(self):
        self.run_layer_test(
            SoftMoE,
            init_kwargs={"num_experts": 3, "intermediate_dim": 2},
            input_shape=(2, 4, 6),
            expected_output_shape=(2, 4, 6),
            expected_num_trainable_weights=5,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=True,
        )

    def test_config(self):
        layer = SoftMoE(
            router=SoftRouter(3, 4, allow_lookahead=True),
            intermediate_dim=2,
            causal=True,
        )
        copy = SoftMoE.from_config(layer.get_config())
        self.assertEqual(copy.get_config(), layer.get_config())
        self.assertTrue(copy.causal)
        self.assertEqual(copy.router.slots_per_expert, 4)
        self.assertEqual(copy.experts.intermediate_dim, 2)

    def test_default_names(self):
        keras.utils.clear_session(free_memory=False)
        names = [
            SoftMoE(num_experts=2, intermediate_dim=2).name for _ in range(3)
        ]
        self.assertEqual(names, ["soft_moe", "soft_moe_1", "soft_moe_2"])

    @parameterized.parameters(
        ({"num_experts": None}, "`num_experts` must be given"),
        ({"intermediate_dim": None}, "`intermediate_dim` must be given"),
        ({"router": "top_k"}, "router='top_k'"),
        ({"router": TopKRouter(4)}, "a SoftRouter. Received: router=<TopK"),
        ({"router": 3}, "`router` must be a name or a layer"),
        ({"experts": "best"}, "experts='best'"),
        ({"slots_per_expert": 0}, "slots_per_expert=0"),
        (
            {"router": SoftRouter(4), "slots_per_expert": 2},
            "`slots_per_expert` can only be given if `router` is a name",
        ),
        ({"router": SoftRouter(3)}, "must agree on the number of experts"),
        ({"causal": True}, "SoftMoE cannot be causal.*causal=True"),
        ({"causal": True, "router": SoftRouter(4)}, "allow_lookahead=True"),
    )
    def test_errors(self, kwargs, message):
        kwargs = {"num_experts": 4, "intermediate_dim": 2, **kwargs}
        with self.assertRaisesRegex(ValueError, message):
            SoftMoE(**kwargs)

    def test_errors_of_shapes(self):
        for shape in ((4, 5), (2, 4, None)):
            layer = SoftMoE(num_experts=2, intermediate_dim=2)
            with self.assertRaisesRegex(ValueError, r"input_shape=\("):
                layer.build(shape)
        with self.assertRaisesRegex(ValueError, r"mask.shape=\(2, 4, 1\)"):
            make()(inputs(), mask=ops.ones((2, 4, 1), "bool"))
        layer = make(WiderExperts(3, width=4, said=5))
        with self.assertRaisesRegex(ValueError, "Received width 4, said 5"):
            layer(inputs())


class CountTest(TestCase):
    """Published sizes of ViTs with Soft MoE in their last blocks."""

    @parameterized.named_parameters(
        ("S_16", 384, 12, 6, 16, 128, 1, 0.922, 0.933),
        ("B_16", 768, 12, 6, 16, 128, 1, 3.684, 3.7),
        ("L_16", 1024, 24, 12, 16, 128, 1, 13.096, 13.1),
        ("H_14", 1280, 32, 16, 14, 128, 2, 27.282, 27.3),
        ("H_14_256", 1280, 32, 16, 14, 256, 1, 54.138, 54.1),
    )
    def test_count(
        self, dim, depth, sparse, patch, experts, slots, body, paper
    ):
        layer = SoftMoE(experts, 4 * dim, slots, experts="mlp")
        # In this scope a variable has a shape but no value.
        with keras.StatelessScope(initialize_variables=False):
            layer.build((None, None, dim))
        count = sum(int(np.prod(v.shape)) for v in layer.variables)
        keras.utils.clear_session(free_memory=False)
        feed_forward = 8 * dim**2 + 5 * dim
        phi = dim * experts * slots + 1
        self.assertEqual(count, experts * feed_forward + phi)
        attention = 4 * (dim**2 + dim)
        total = sparse * count + (depth - sparse) * feed_forward
        total += depth * (attention + 4 * dim) + 2 * dim  # layer norms
        # The blocks alone, then with patches, positions and the head for JFT.
        self.assertLess(abs(total / 1e9 - body), 6e-4)
        total += (3 * patch**2 + 1) * dim + (224 // patch) ** 2 * dim
        total += 29593 * (dim + 1)
        self.assertLess(abs(total / 1e9 - paper), 0.003 * paper)
