import keras
from absl.testing import parameterized
from keras import ops

from keras_moe.ops import expert_capacity
from tests.test_case import TestCase


class ExpertCapacityTest(TestCase):
    @parameterized.parameters(
        (1000, 16, 2, 1.25, 157),  # 156.25
        (7, 4, 1, 1.0, 2),  # 1.75
        (64, 8, 2, 1.05, 17),  # 16.8
        (3, 8, 2, 1.25, 1),  # 0.94
        (100, 10, 1, 1.1, 11),  # 11.000000000000002 in binary
        (0, 8, 2, 1.0, 0),
    )
    def test_values(self, num_tokens, num_experts, top_k, factor, capacity):
        arguments = (num_experts, top_k, factor)
        self.assertEqual(expert_capacity(num_tokens, *arguments), capacity)
        if keras.config.backend() != "tensorflow":
            return  # only there are sizes ever tensors
        dynamic = expert_capacity(ops.array(num_tokens, "int32"), *arguments)
        self.assertEqual(int(dynamic), capacity)

    def test_no_limit(self):
        self.assertIsNone(expert_capacity(10, 4, 2, None))
        self.assertIsNone(expert_capacity(10, 4, 2, float("inf")))
