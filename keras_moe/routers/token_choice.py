"""Steps on the way from ranked experts to weights, on plain tensors."""

import keras
from keras import ops

from keras_moe.ops.selection import take_chosen


def drop_experts(ranked, rate, seed):
    """What experts are ranked by, where some come last by chance.

    Args:
        ranked: `(T, E)`, `-inf` for experts that are out of the question.
        rate: float. Share of the experts that come last.
        seed: A `keras.random.SeedGenerator`.

    Returns:
        `(T, E)`. What was dropped still ranks above `-inf`.
    """
    draws = keras.random.uniform(ops.shape(ranked), seed=seed)
    return ops.where(draws < rate, ops.minimum(ranked, -1e30), ranked)


def append_last_experts(indices, num_always_on, num_experts):
    """The choices `(T, K)`, and behind them the last experts."""
    if num_always_on == 0:
        return indices
    always = ops.arange(num_experts - num_always_on, num_experts, dtype="int32")
    always = ops.expand_dims(always, 0)
    always = ops.tile(always, (ops.shape(indices)[0], 1))
    return ops.concatenate([indices, always], axis=-1)


def scaled_by_expert(weights, scale, indices, num_experts):
    """Weights `(T, K)` times a scale `(E,)` of experts, or `(1,)` of all."""
    if scale.shape[0] == 1:
        return weights * scale
    # A take from (E,) would have a gradient that adds up in any order.
    shape = (ops.shape(indices)[0], num_experts)
    scale = ops.broadcast_to(ops.expand_dims(scale, 0), shape)
    return weights * take_chosen(scale, indices)


def without_last_experts(probs, indices, num_zero):
    """Scores in which the last experts have no share.

    Args:
        probs: `(T, E)`.
        indices: `(T, K)` int32. The chosen experts.
        num_zero: int. Number of experts without a share.

    Returns:
        `(probs, counts)`: the scores, 0 for the last experts, and `(T, K)`
        bool, whether a choice has a share. Where none has, all scores are one:
        divided by their norm, zeros might become NaN.
    """
    first = probs.shape[-1] - num_zero
    counts = indices < first
    none = ops.logical_not(ops.any(counts, axis=-1, keepdims=True))
    experts = ops.expand_dims(ops.arange(probs.shape[-1], dtype="int32"), 0)
    probs = ops.where(experts < first, probs, ops.zeros_like(probs))
    return ops.where(none, ops.ones_like(probs), probs), counts
