"""Choices that may not exist: tokens with fewer experts than `K`."""

from keras import ops

from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices


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
