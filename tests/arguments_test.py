"""Numbers that are none, given to routers and losses."""

import re

import numpy as np
from absl.testing import parameterized

from keras_moe import losses
from keras_moe import ops
from keras_moe import routers
from tests.test_case import TestCase

LINEAR = ("jitter", "temperature", "normalize_inputs_epsilon")
TOP_K = (
    *("top_k", "num_always_on", "num_expert_groups", "bias_update_steps"),
    *("normalize_order", "normalize_epsilon", "weight_scale", "noise_stddev"),
    *("gumbel_noise", "bias_update_rate", "expert_dropout", "logit_softcap"),
)
# What makes it, what else it needs, its numbers.
CASES = (
    (routers.DenseRouter, {}, ("num_experts", *LINEAR)),
    (routers.TopKRouter, {}, TOP_K),
    (routers.TopKRouter, {"num_expert_groups": 2}, ("top_k_groups",)),
    (
        routers.CosineRouter,
        {},
        ("projection_dim", "initial_temperature", "max_scale"),
    ),
    (
        routers.DSelectKRouter,
        {},
        ("top_k", "gamma", "entropy_weight", "unused_code_weight"),
    ),
    (routers.EntmaxRouter, {}, ("alpha", "max_experts")),
    (
        routers.ExpertChoiceRouter,
        {},
        ("capacity_factor", "capacity", "capacity_multiple_of", "noise_stddev"),
    ),
    (routers.GShardRouter, {}, ("threshold",)),
    (routers.HashRouter, {"num_ids": 4}, ("top_k", "weight_scale")),
    (routers.HashRouter, {}, ("num_ids",)),
    (
        routers.MLPRouter,
        {"projection_dim": 3},
        (
            "normalize_projection_epsilon",
            "standardize_logits",
            "zero_weight_experts",
        ),
    ),
    (routers.NoisyTopKRouter, {}, ("noise_stddev", "noise_epsilon")),
    (routers.RandomRouter, {}, ("top_k",)),
    (
        routers.ReLURouter,
        {},
        ("top_k", "initial_l1_coefficient", "l1_multiplier"),
    ),
    (routers.SinkhornRouter, {}, ("top_k", "num_iterations", "per")),
    (
        routers.SoftRouter,
        {},
        ("slots_per_expert", "epsilon", "noise_stddev", "gumbel_noise"),
    ),
    (routers.SparseMixerRouter, {}, ("top_k", "jitter_epsilon")),
    (routers.TaskRouter, {"num_tasks": 2}, ("top_k",)),
    (routers.TopPRouter, {}, ("top_p", "max_experts")),
    (
        routers.HierarchicalRouter,
        {"num_groups": 2, "experts_per_group": 2},
        ("num_groups", "experts_per_group", "top_k", "top_k_groups"),
    ),
    (losses.RouterZLoss, {}, ("weight",)),
    (losses.LoadBalancingLoss, {}, ("weight", "per")),
    (losses.ImportanceLoss, {}, ("ddof",)),
    (losses.LoadLoss, {}, ("ddof",)),
    (losses.EntropyLoss, {"kind": "marginal"}, ("threshold", "modality")),
    (losses.DeviceBalanceLoss, {}, ("num_devices",)),
    (losses.CommunicationBalanceLoss, {"num_devices": 2}, ("max_devices",)),
    (losses.CompetitiveLoss, {}, ("variance",)),
    (losses.OrthogonalityRegularizer, {}, ("weight", "expert_axis")),
    (ops.sinkhorn, {"logits": [[0.0]]}, ("num_iterations",)),
)
NAMED = [
    (f"{make.__name__}_{name}", make, kwargs, name)
    for make, kwargs, names in CASES
    for name in names
]


class ArgumentsTest(TestCase):
    @parameterized.named_parameters(NAMED)
    def test_no_number(self, make, kwargs, name):
        is_router = getattr(make, "__module__", "").startswith(
            "keras_moe.routers"
        )
        if is_router and make is not routers.HierarchicalRouter:
            kwargs = {"num_experts": 4, **kwargs}
        for value in (True, np.nan, np.inf, -np.inf, "1"):
            received = re.escape(f"{name}={value!r}")
            message = f"^`{name}` must be .*Received: .*{received}"
            with self.assertRaisesRegex(ValueError, message):
                make(**{**kwargs, name: value})

    def test_numbers_of_numpy_are_numbers(self):
        loss = losses.RouterZLoss(weight=np.float32(0.5))
        self.assertEqual(loss.weight, 0.5)
        router = routers.GShardRouter(4, 3, threshold=np.array([0.5, 0.25]))
        self.assertEqual(router.threshold, [0.5, 0.25])
