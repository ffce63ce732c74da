"""The published systems by name, with their published numbers."""

import keras
from absl.testing import parameterized

from keras_moe import routers
from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.routers import named_routers as named
from tests.test_case import TestCase

NUMBERS = {
    "top_k": {"top_k": 2, "normalize_weights": True},
    "jacobs": {"score_activation": "softmax"},
    "noisy_top_k": {"top_k": 4, "noise_stddev": "learned"},
    "gshard": {"top_k": 2, "threshold": 0.5, "policy": "random"},
    "switch": {"top_k": 1, "jitter": 0.01, "normalize_weights": False},
    "glam": {"num_experts": 64, "top_k": 2},
    "v_moe": {
        "num_experts": 32,
        "top_k": 2,
        "noise_stddev": 1 / 32,
        "normalize_weights": False,
    },
    "dit_moe": {"top_k": 2, "normalize_weights": False},
    "swin_moe_cosine": {
        "num_experts": 32,
        "top_k": 1,
        "noise_stddev": 1 / 32,
        "projection_dim": 256,
        "initial_temperature": 0.5,
    },
    "st_moe": {"top_k": 2, "threshold": 0.2},
    "expert_choice": {"capacity_factor": 2.0},
    "mixtral": {"num_experts": 8, "top_k": 2, "score_after_selection": True},
    "deepseek_v3": {
        "num_experts": 256,
        "top_k": 8,
        "num_expert_groups": 8,
        "top_k_groups": 4,
        "score_activation": "sigmoid",
        "weight_scale": 2.5,
        "expert_bias": True,
        "bias_update_rate": 1e-3,
    },
    "kimi_k2": {
        "num_experts": 384,
        "top_k": 8,
        "num_expert_groups": 1,
        "score_activation": "sigmoid",
        "weight_scale": 2.827,
        "expert_bias": True,
    },
}


class NamedTest(TestCase):
    def test_all_are_listed(self):
        self.assertEqual(set(NUMBERS), set(named._NAMED))
        for name in NUMBERS:
            self.assertIn(f'- `"{name}"`: `', routers.get.__doc__)

    @parameterized.named_parameters((name, name) for name in NUMBERS)
    def test_numbers(self, name):
        wanted = dict(NUMBERS[name])
        given = {} if "num_experts" in wanted else {"num_experts": 12}
        config = routers.get(name, **given).get_config()
        for key, value in {**wanted, **given}.items():
            self.assertEqual(config[key], value, key)

    @parameterized.named_parameters((name, name) for name in NUMBERS)
    def test_in_a_layer(self, name):
        # With as many experts as the groups of DeepSeek-V3 need.
        layer = MoE(
            num_experts=32, intermediate_dim=2, router=name, losses=None
        )
        x = keras.Input((6,))
        self.assertEqual(layer(x).shape, (None, 6))

    def test_overriding(self):
        router = routers.get("deepseek_v3", num_experts=16, top_k=4)
        self.assertEqual((router.num_experts, router.top_k), (16, 4))
        small = routers.get("v_moe", num_experts=4)
        self.assertEqual(small.get_config()["noise_stddev"], 0.25)

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "router='swich'"):
            routers.get("swich", num_experts=8)
        router = routers.TopKRouter(4)
        self.assertIs(routers.get(router), router)
        with self.assertRaisesRegex(ValueError, "must agree"):
            MoE(num_experts=4, router="mixtral", experts=GLUExperts(8, 2))
