"""Choices that may not exist: tokens with fewer experts than `K`."""

from keras import ops

from keras_moe.checks import is_int
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices


def check_max_experts(max_experts, num_experts):
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


def check_normalize_weights(normalize_weights, max_experts, default):
    """`normalize_weights`, by default `default` if several may be chosen."""
    if normalize_weights is None:
        return default and max_experts != 1
    if normalize_weights and max_experts == 1:
        raise ValueError(
            "With `max_experts=1`, normalized weights are always one, and the "
            "router would get no gradient. Received: "
            f"normalize_weights={normalize_weights}, max_experts=1"
        )
    return normalize_weights


def positive_choices(scores, weights, k):
    """The experts of positive weight, at most the best `k` of each token.

    Args:
        scores: `(T, E)`. What is best: the order, and who is among the `k`.
            Ties go to the lower index.
        weights: `(T, E)`, not negative, larger where the score is larger.
        k: int, at most `E`.

    Returns:
        `(expert_indices, expert_weights)`, `(T, k)` each, best first. What
        comes after the experts of positive weight has the index `E` and the
        weight 0: these choices do not exist. A weight that is NaN stays one.
    """
    indices = top_k_indices(scores, k)
    weights_of_choices = take_chosen(weights, indices)
    return existing_choices(
        indices, weights_of_choices, weights_of_choices <= 0, scores.shape[-1]
    )


def existing_choices(indices, weights, missing, num_experts):
    """Gives choices `(T, K)` that do not exist the index `E` and weight 0."""
    return (
        ops.where(missing, ops.full_like(indices, num_experts), indices),
        ops.where(missing, ops.zeros_like(weights), weights),
    )
