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
    """
    scores = ops.stop_gradient(scores)
    lowest = ops.full_like(scores, float("-inf"))
    scores = ops.where(ops.isnan(scores), lowest, scores)
    # XLA sorts -0 below 0, the others take them for a tie.
    scores = ops.where(ops.equal(scores, 0), ops.zeros_like(scores), scores)
    return ops.cast(backend.top_k_indices(scores, k), "int32")
