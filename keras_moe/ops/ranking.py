from keras import ops


def descending_ranks(scores):
    """How many entries come before each one in descending order.

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
