"""Checks of arguments that several routers have."""


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def check_int(name, value, minimum):
    if not _is_int(value) or value < minimum:
        raise ValueError(
            f"`{name}` must be an int of at least {minimum}. "
            f"Received: {name}={value!r}"
        )


def check_at_least(name, value, minimum):
    if not value >= minimum:
        raise ValueError(
            f"`{name}` must be at least {minimum}. Received: {name}={value}"
        )


def check_rate(name, value):
    if not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be at least 0 and below 1. Received: {name}={value}"
        )


def check_one_of(name, value, known):
    if not any(value is k or value == k for k in known):
        raise ValueError(
            f"`{name}` must be one of {known}. Received: {name}={value!r}"
        )


def check_top_k(top_k, num_experts):
    if not _is_int(top_k) or not 1 <= top_k <= num_experts:
        raise ValueError(
            "`top_k` must be an int between 1 and `num_experts`. "
            f"Received: top_k={top_k!r}, num_experts={num_experts}"
        )


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
