"""Arguments of `SoftMoE`, their errors, and published sizes."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import GLUExperts
from keras_moe.experts import MLPExperts
from keras_moe.moe.soft_moe import SoftMoE
from keras_moe.routers import TopKRouter
from keras_moe.routers.soft_router import SoftRouter
from tests.moe.soft_moe_test import WiderExperts
from tests.moe.soft_moe_test import make
from tests.routers.soft_router_test import inputs
from tests.test_case import TestCase


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
        ({"router": 3}, "must be 'soft' or a SoftRouter. Received: router=3"),
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
