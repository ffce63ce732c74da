"""Checks of arguments that only routers have."""

from keras_moe.checks import check_at_least
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_number
from keras_moe.checks import check_one_of
from keras_moe.checks import is_int
from keras_moe.ops.scores import SCORE_ACTIVATIONS


def check_choices(
    name,
    number,
    num_experts,
    num_always_on,
    num_groups,
    top_k_groups,
    group_score,
):
    """Checks how many experts are chosen, and the groups they are chosen from.

    Args:
        name: str. `"top_k"` or `"eval_top_k"`.
        number: What was given for it.
        num_experts, num_always_on, num_groups, top_k_groups, group_score: The
            other arguments of a `TopKRouter`.
    """
    candidates = num_experts - num_always_on
    if not is_int(number) or not 1 <= number <= candidates:
        always_on = f", num_always_on={num_always_on}" * (num_always_on > 0)
        raise ValueError(
            f"`{name}` must be an int between 1 and `num_experts`. "
            f"Received: {name}={number!r}, num_experts={num_experts}{always_on}"
        )
    check_int("num_expert_groups", num_groups, minimum=1)
    if num_groups == 1:
        return
    if candidates % num_groups:
        raise ValueError(
            "`num_expert_groups` must be a divisor of the number of experts "
            "to choose from. Received: "
            f"num_expert_groups={num_groups}, {candidates} experts"
        )
    check_int("top_k_groups", top_k_groups, minimum=1)
    check_int("group_score", group_score, minimum=1)
    size = candidates // num_groups
    if group_score > size:
        raise ValueError(
            f"`group_score` must be at most the size of a group, {size}. "
            f"Received: group_score={group_score}"
        )
    if not number <= top_k_groups * size or top_k_groups > num_groups:
        raise ValueError(
            "`top_k_groups` must be at most `num_expert_groups`, and that many "
            f"groups must hold `{name}` experts. Received: "
            f"top_k_groups={top_k_groups}, num_expert_groups={num_groups}, "
            f"{name}={number}, groups of {size} experts"
        )


def check_quantiles(top_k, num_experts, num_groups):
    """Checks what an expert bias from quantiles cannot go with."""
    if top_k >= num_experts or num_groups > 1:
        raise ValueError(
            "`bias_update='quantile'` needs experts that a token does not "
            "choose, and goes with no `num_expert_groups`. Received: "
            f"top_k={top_k}, {num_experts} experts to choose from, "
            f"num_expert_groups={num_groups}"
        )


def check_zero_weight_experts(
    number, num_experts, score_after_selection, num_always_on
):
    check_int("zero_weight_experts", number, minimum=0)
    if number >= num_experts:
        raise ValueError(
            "`zero_weight_experts` must be less than `num_experts`. Received: "
            f"zero_weight_experts={number}, num_experts={num_experts}"
        )
    if number and (score_after_selection or num_always_on):
        raise ValueError(
            "`zero_weight_experts` must be 0 with `score_after_selection`, "
            "where the scores of the chosen are their weights already, and "
            f"with `num_always_on`. Received: zero_weight_experts={number}, "
            f"score_after_selection={score_after_selection}, "
            f"num_always_on={num_always_on}"
        )


def check_weights(score_activation, normalize_epsilon, weight_scale):
    """Checks how scores become weights."""
    check_one_of("score_activation", score_activation, SCORE_ACTIVATIONS)
    check_at_least("normalize_epsilon", normalize_epsilon, 0)
    check_number("weight_scale", weight_scale)


def as_max_experts(max_experts, num_experts):
    """`K`: `max_experts`, or all experts for `None`."""
    if max_experts is None:
        return num_experts
    if not is_int(max_experts) or not 1 <= max_experts <= num_experts:
        raise ValueError(
            "`max_experts` must be an int between 1 and `num_experts`, or "
            f"None. Received: max_experts={max_experts!r}, "
            f"num_experts={num_experts}"
        )
    return max_experts


def as_normalize_weights(
    value,
    num_choices,
    default=True,
    name="normalize_weights",
    limit_name="top_k",
):
    """Whether to normalize weights, by default `default` if there are several.

    One weight, normalized, would always be one, and the router would get no
    gradient.

    Args:
        value: What was given: a bool, or `None` for the default.
        num_choices: int, or `None` for an unknown number above 1. The most
            choices that a token has.
        default: bool. What `None` stands for if there may be several choices.
        name: str. The argument, for errors.
        limit_name: str. The argument that limits the choices to one.
    """
    if value is None:
        return default and num_choices != 1
    check_bool(name, value)
    if value and num_choices == 1:
        raise ValueError(
            f"`{name}` must be False with `{limit_name}=1`: the weight would "
            "always be one, and the router would get no gradient. "
            f"Received: {name}={value}, {limit_name}=1"
        )
    return value
