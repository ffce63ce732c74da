import keras
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import Capacity
from keras_moe.ops import expert_capacity
from tests.test_case import TestCase

# What each system makes of (tokens, experts, factor, top_k): run by hand with
# its own formula. None: not recorded.
SIZES = (
    (1000, 16, 1.25, 2),
    (7, 4, 1.0, 1),
    (64, 8, 1.05, 2),
    (3, 8, 1.25, 2),
)
SYSTEMS = {
    "mesh": (78, 4, 8, 4),  # Mesh TensorFlow, ST-MoE
    "flaxformer": (78, 4, 8, 4),  # Switch Transformer in JAX
    "v_moe": (160, 4, 20, 4),
    "deepspeed": (157, 4, 17, 4),
    "ceil": (157, 2, 17, 1),  # Megatron; the papers of GShard and Switch
    "tutel": (156, 2, 16, 2),
    "floor": (156, 1, 16, 0),  # MegaBlocks
    "maxtext": (156, 2, 16, 1),
    "fastmoe": (156, 1, 17, 1),
    # floor(S c / E), 0 becomes 4, up to a multiple of 4.
    "lingvo": (80, 4, 8, 4),
}


class ExpertCapacityTest(TestCase):
    def both(self, num_tokens, *arguments, **kwargs):
        """From a number, and, on TensorFlow, from a tensor."""
        known = expert_capacity(num_tokens, *arguments, **kwargs)
        if keras.config.backend() == "tensorflow":  # only there are any
            dynamic = ops.array(num_tokens, "int32")
            dynamic = expert_capacity(dynamic, *arguments, **kwargs)
            self.assertEqual(int(dynamic), known)
        return known

    @parameterized.named_parameters((rule, rule) for rule in SYSTEMS)
    def test_rules(self, rule):
        for size, capacity in zip(SIZES, SYSTEMS[rule], strict=True):
            num_tokens, num_experts, factor, top_k = size
            self.assertEqual(
                self.both(num_tokens, num_experts, top_k, factor, rule=rule),
                capacity,
                size,
            )

    @parameterized.parameters(
        (1000, 4, 2, 1e-7, "ceil", 1),
        (10**7, 1, 1, 4e-7, "ceil", 4),
        (10**6, 1, 1, 1e-300, "ceil", 1),
        (100, 10, 1, 1.1, "ceil", 11),  # 11.000000000000002 in binary
        (0, 8, 2, 1.0, "ceil", 0),
        (10, 4, 2, 1.0, "flaxformer", 4),  # 2.5, to the even 2, at least 4
        (22, 4, 1, 1.0, "flaxformer", 6),  # 5.5, to the even 6
        (26, 4, 1, 1.0, "flaxformer", 6),  # 6.5, to the even 6
        (16, 4, 2, 1.25, "lingvo", 8),  # 5
        (2, 8, 2, 8.0, "mesh", 4),  # at most the 2 tokens, at least 4
        (2, 8, 2, 30.0, "mesh", 4),
        (100, 8, 2, 30.0, "mesh", 100),  # at most the tokens
    )
    def test_values(self, num_tokens, num_experts, top_k, factor, rule, wanted):
        capacity = self.both(num_tokens, num_experts, top_k, factor, rule=rule)
        self.assertEqual(capacity, wanted)

    def test_multiple_of(self):
        self.assertEqual(self.both(1000, 16, 2, 1.25, multiple_of=8), 160)

    def test_no_limit(self):
        self.assertIsNone(expert_capacity(10, 4, 2, None))
        self.assertIsNone(expert_capacity(10, 4, 2, float("inf")))

    def test_unknown_rule(self):
        with self.assertRaisesRegex(ValueError, "rule='round'"):
            expert_capacity(10, 4, 2, 1.0, rule="round")


class CapacityTest(TestCase):
    def test_of(self):
        capacity = Capacity(1.0, eval_capacity_factor=2.0, per="sequence")
        # 48 tokens in 3 sequences, 4 experts, 2 each.
        self.assertEqual(capacity.group_size(48, 3), 16)
        self.assertEqual(capacity.rows_per_expert(16, 4, 2, True), 8)
        self.assertEqual(capacity.rows_per_expert(16, 4, 2, False), 16)
        self.assertEqual(Capacity(1.0, per=2).group_size(48, 3), 32)
        self.assertEqual(Capacity(1.0).group_size(48, 3), 48)
        self.assertEqual(Capacity(size=5).rows_per_expert(48, 4, 2, True), 5)
        self.assertIsNone(Capacity().rows_per_expert(48, 4, 2, True))
        for nothing in (Capacity(), Capacity(drop_policy="weight")):
            self.assertFalse(nothing.drops)
        self.assertTrue(Capacity(size=1).drops)

    def test_config(self):
        capacity = Capacity(
            1.5,
            rule="tutel",
            multiple_of=2,
            drop_policy="random",
            per=2,
            normalize_kept_weights=True,
            seed=3,
        )
        config = keras.saving.serialize_keras_object(capacity)
        again = keras.saving.deserialize_keras_object(config)
        self.assertEqual(again.get_config(), capacity.get_config())

    @parameterized.parameters(
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"eval_capacity_factor": "2"}, "eval_capacity_factor='2'"),
        ({"multiple_of": 0}, "multiple_of=0"),
        ({"size": 0}, "size=0"),
        (
            {"size": 4, "capacity_factor": 1.0},
            "place of `capacity_factor`",
        ),
        ({"rule": "round"}, "rule='round'"),
        ({"drop_policy": "last"}, "drop_policy='last'"),
        ({"per": "token"}, "per='token'"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            Capacity(**kwargs)
