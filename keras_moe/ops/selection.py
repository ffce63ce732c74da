"""The largest entries along an axis, and ranks, the same on every backend."""

from keras import ops

from keras_moe import backend


def top_k_indices(scores, k):
    """Indices of the `k` largest scores of each token, best first.

    Ties go to the lower index, and a NaN is smaller than any number, on every
    backend. No gradient flows through the choice.

    Args:
        scores: `(T, E)`.
        k: int, at most `E`.

    Returns:
        `(T, k)` int32.

    Example:

    >>> indices = keras_moe.ops.top_k_indices(
    ...     keras.ops.array([[0.5, 2.0, 2.0]]), 2
    ... )
    >>> keras.ops.convert_to_numpy(indices).tolist()
    [[1, 2]]
    """
    scores = ops.stop_gradient(scores)
    scores = ops.where(ops.isnan(scores), float("-inf"), scores)
    # XLA sorts -0 below 0, the others take them for a tie.
    scores = ops.where(ops.equal(scores, 0), ops.zeros_like(scores), scores)
    return ops.cast(backend.top_k_indices(scores, k), "int32")


def descending_ranks(scores):
    """The rank of each entry in descending order, from 0.

    Ties go to the lower index, and a NaN comes last, on every backend. No
    gradient flows through the ranks.

    Args:
        scores: `(..., S)`.

    Returns:
        `(..., S)` int32, a permutation of 0 to `S - 1` along the last axis.
    """
    scores = ops.stop_gradient(scores)
    scores = ops.where(ops.isnan(scores), float("-inf"), scores)
    # XLA sorts -0 below 0, the others take them for a tie.
    scores = ops.where(ops.equal(scores, 0), ops.zeros_like(scores), scores)
    order = ops.argsort(-scores, axis=-1)
    return ops.cast(ops.argsort(order, axis=-1), "int32")


def take_chosen(x, indices):
    """The entries of `x` at the indices, along the last axis.

    Args:
        x: `(..., E)`.
        indices: `(..., K)`, whole numbers from 0 to `E - 1`.

    Returns:
        `(..., K)`.
    """
    return backend.take_chosen(x, indices)


def limit_to_groups(scores, num_groups, top_k_groups, group_score=2):
    """The scores, with `-inf` outside the best groups of experts.

    A group is `E / num_groups` consecutive experts. The groups with the largest
    sum of their `group_score` best scores are kept.

    Args:
        scores: `(T, E)`.
        num_groups: int, a divisor of `E`.
        top_k_groups: int. Groups kept for each token.
        group_score: int. Number of scores of a group that are summed: 1
            (DeepSeek-V2) or 2 (DeepSeek-V3). Defaults to `2`.

    Returns:
        `(T, E)`, without a gradient.
    """
    scores = ops.stop_gradient(scores)
    num_experts = scores.shape[-1]
    grouped = ops.reshape(scores, (-1, num_groups, num_experts // num_groups))
    best = backend.top_k_indices(grouped, group_score)  # (T, G, group_score)
    best = take_chosen(grouped, ops.cast(best, "int32"))
    kept = top_k_indices(ops.sum(best, axis=-1), top_k_groups)
    kept = ops.sum(ops.one_hot(kept, num_groups, dtype="int32"), axis=1)
    kept = ops.expand_dims(kept > 0, -1)  # (T, G, 1)
    grouped = ops.where(kept, grouped, float("-inf"))
    return ops.reshape(grouped, (-1, num_experts))
