"""Checks of arguments that only routers have."""

from keras_moe.checks import check_int
from keras_moe.checks import check_int_up_to


def check_top_k(top_k, num_experts):
    check_int_up_to("top_k", top_k, "num_experts", num_experts)


def check_groups(num_experts, top_k, num_groups, top_k_groups, group_score):
    check_int("num_expert_groups", num_groups, minimum=1)
    if num_groups == 1:
        return
    if num_experts % num_groups:
        raise ValueError(
            "`num_expert_groups` must be a divisor of the number of experts "
            "to choose from. Received: "
            f"num_expert_groups={num_groups}, {num_experts} experts"
        )
    check_int("top_k_groups", top_k_groups, minimum=1)
    check_int("group_score", group_score, minimum=1)
    size = num_experts // num_groups
    if group_score > size:
        raise ValueError(
            f"`group_score` must be at most the size of a group, {size}. "
            f"Received: group_score={group_score}"
        )
    if not top_k <= top_k_groups * size or top_k_groups > num_groups:
        raise ValueError(
            "`top_k_groups` must be at most `num_expert_groups`, and as many "
            "groups must hold `top_k` experts. Received: "
            f"top_k_groups={top_k_groups}, num_expert_groups={num_groups}, "
            f"top_k={top_k}, groups of {size} experts"
        )
