"""Choices of tokens that have fewer than `K` experts."""

from keras import ops

from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices


def positive_choices(scores, weights, k):
    """The best experts of each token that have a positive weight, at most `k`.

    Args:
        scores: `(T, E)`. The `k` largest are chosen, and sort the choices.
            Ties go to the lower index.
        weights: `(T, E)`, not negative, in the same order as the scores.
        k: int, at most `E`.

    Returns:
        `(expert_indices, expert_weights)`, `(T, k)` each, best first. A
        choice without a positive weight does not exist: it has the index `E`
        and the weight 0. A NaN weight stays NaN.
    """
    indices = top_k_indices(scores, k)
    weights_of_choices = take_chosen(weights, indices)
    return existing_choices(
        indices, weights_of_choices, weights_of_choices <= 0, scores.shape[-1]
    )


def existing_choices(indices, weights, missing, num_experts):
    """Sets the index `E` and the weight 0 where choices are missing."""
    return (
        ops.where(missing, ops.full_like(indices, num_experts), indices),
        ops.where(missing, ops.zeros_like(weights), weights),
    )
