"""How unequal a distribution over the experts is."""

from keras import ops


def entropy(probs):
    """`-sum(p * log(p))` over the last axis, where `0 * log(0)` is 0.

    Args:
        probs: `(..., E)`, not negative.

    Returns:
        `(...)`. Entries of 0 get a gradient of 0.
    """
    positive = probs > 0
    logs = ops.log(ops.where(positive, probs, ops.ones_like(probs)))
    return -ops.sum(probs * logs, axis=-1)


def squared_variation(values, ddof=0):
    """Squared coefficient of variation over the last axis, variance / mean^2.

    Args:
        values: `(..., E)`.
        ddof: `0` for the population variance, `1` for the sample variance.

    Returns:
        `(...)`. 0 where all values are 0, or where there is one value.
    """
    num_values = values.shape[-1]
    total = ops.sum(values, axis=-1, keepdims=True)
    # Shares first: squares of small sums underflow in float32.
    total = ops.where(ops.abs(total) > 1e-20, total, ops.ones_like(total))
    shares = values / total
    deviations = shares - ops.mean(shares, axis=-1, keepdims=True)
    variance = ops.sum(ops.square(deviations), axis=-1)
    variance = variance / max(num_values - ddof, 1)
    return variance * num_values**2
