"""How `MoE` takes its parts in: names with arguments, shared parts, context."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import GLUExperts
from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.layers import SoftMoE
from keras_moe.routers import MLPRouter
from keras_moe.routers import TopKRouter
from tests.test_case import TestCase


class ArgumentsOfExpertsTest(TestCase):
    @parameterized.parameters(MoE, SoftMoE)
    def test_they_are_handed_on_to_experts_by_name(self, layer_class):
        layer = layer_class(
            *(4, 3),
            experts="mlp",
            dropout=0.5,
            use_bias=False,
            kernel_initializer="ones",
            output_dim=2,
        )
        self.assertIsInstance(layer.experts, MLPExperts)
        self.assertEqual(layer.experts.dropout, 0.5)
        layer.build((None, 4, 5))
        self.assertIsNone(layer.experts.up_bias)
        self.assertAllEqual(layer.experts.up_kernel, np.ones((4, 5, 3)))
        self.assertEqual(layer.compute_output_shape((1, 4, 5)), (1, 4, 2))
        again = layer_class.from_config(layer.get_config())
        self.assertEqual(again.experts.dropout, 0.5)
        self.assertEqual(again.get_config(), layer.get_config())

    @parameterized.parameters(MoE, SoftMoE)
    def test_unknown_ones_are_named(self, layer_class):
        message = "does not know `droput`.*'dropout'.*Received: {'droput': 0.1}"
        with self.assertRaisesRegex(ValueError, message):
            layer_class(4, 3, droput=0.1)
        with self.assertRaisesRegex(ValueError, "only if `experts` is a name"):
            layer_class(experts=GLUExperts(4, 3), dropout=0.1)


class SharedPartsTest(TestCase):
    @parameterized.parameters(
        ("experts", lambda: GLUExperts(4, 3)),
        ("router", lambda: TopKRouter(4, expert_bias=True)),
        ("shared_experts", lambda: keras.layers.Dense(5)),
        ("pre_experts", lambda: keras.layers.Dense(5)),
        ("post_experts", lambda: keras.layers.Dense(5)),
    )
    def test_a_part_of_two_layers_is_one_again_after_loading(self, name, make):
        part = make()
        kwargs = {"num_experts": 4, name: part}
        if name != "experts":
            kwargs["intermediate_dim"] = 3
        x = keras.Input((5,))
        model = keras.Model(x, MoE(**kwargs)(MoE(**kwargs)(x)))
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        first, second = (
            getattr(layer, name)
            for layer in loaded.layers
            if isinstance(layer, MoE)
        )
        self.assertIs(first, second)
        x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
        self.assertAllClose(loaded(x), model(x), atol=1e-6)

    @parameterized.parameters(True, False)
    def test_a_part_that_the_model_calls_too(self, moe_first):
        dense = keras.layers.Dense(5)
        layers = [MoE(4, 3, shared_experts=dense), dense]
        inputs = x = keras.Input((5,))
        for layer in layers if moe_first else reversed(layers):
            x = layer(x)
        model = keras.Model(inputs, x)
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        (moe,) = (x for x in loaded.layers if isinstance(x, MoE))
        (plain,) = (x for x in loaded.layers if type(x) is keras.layers.Dense)
        self.assertIs(moe.shared_experts, plain)
        x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
        self.assertAllClose(loaded(x), model(x), atol=1e-6)

    def test_two_parts_stay_two(self):
        x = keras.Input((5,))
        model = keras.Model(x, MoE(4, 3)(MoE(4, 3)(x)))
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        first, second = keras.saving.load_model(path).layers[1:]
        self.assertIsNot(first.experts, second.experts)


class ContextTest(TestCase):
    @parameterized.parameters("mixed_bfloat16", "mixed_float16")
    def test_context_keeps_its_precision(self, policy):
        # Numbers that half precision makes equal, or infinite.
        layer = MoE(
            router=MLPRouter(
                8, 2, hidden_dims=(), residual="logits", dtype=policy
            ),
            experts=GLUExperts(8, 4, dtype=policy),
            losses=None,
            return_routing=True,
            dtype=policy,
        )
        layer.build((None, 8))
        layer.router.context_kernel.assign(np.eye(8))
        rng = np.random.default_rng(0)
        x = (0.01 * rng.normal(size=(200, 8))).astype("float32")
        state = (70000 + rng.normal(size=(200, 8))).astype("float32")
        _, called = layer(x, context=state)
        routed = layer.route(x, context=state)
        self.assertAllEqual(called.expert_indices, routed.expert_indices)
        self.assertAllEqual(called.expert_weights, routed.expert_weights)
        # The largest number belongs to the best expert.
        self.assertAllEqual(
            ops.convert_to_numpy(called.expert_indices)[:, 0],
            np.argmax(state, axis=1),
        )
