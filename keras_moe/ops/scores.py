"""Scores of the experts from logits, and weights from scores."""

from keras import ops

SCORE_ACTIVATIONS = ("softmax", "sigmoid", "sqrt_softplus")


def score(logits, activation):
    """Scores of the experts from their logits.

    Args:
        logits: `(T, E)`.
        activation: `"softmax"` over the experts, or, for each expert on its
            own, `"sigmoid"` or `"sqrt_softplus"`, which is
            `sqrt(log(1 + exp(logits)))`.

    Returns:
        `(T, E)`, not negative.

    Raises:
        ValueError: If `activation` is not known.

    Example:

    >>> scores = keras_moe.ops.score(keras.ops.zeros((1, 4)), "softmax")
    >>> keras.ops.convert_to_numpy(scores).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    if activation == "softmax":
        return softmax(logits)
    if activation == "sigmoid":
        return ops.sigmoid(logits)
    if activation == "sqrt_softplus":
        # The gradient of the root is infinite at 0.
        scores = ops.softplus(logits)
        least = ops.full_like(scores, 1e-30)
        return ops.sqrt(ops.where(scores > least, scores, least))
    raise ValueError(
        f"`activation` must be one of {SCORE_ACTIVATIONS}. "
        f"Received: activation={activation!r}"
    )


def softmax(x, axis=-1):
    """`ops.softmax`, without the warning of Keras for an axis of size 1."""
    if x.shape[axis] == 1:
        return ops.ones_like(x)
    return ops.softmax(x, axis=axis)


def rankable(scores):
    """The scores, with -1e30 for NaN and anything smaller.

    So that experts excluded by minus infinity always come last.
    """
    lowest = ops.full_like(scores, -1e30)
    return ops.where(scores > lowest, scores, lowest)


def normalize_weights(weights, epsilon=1e-20, order=1):
    """Divides the weights of each token by their norm, plus `epsilon`.

    Args:
        weights: `(T, K)`, not negative.
        epsilon: float. Added to the norm. Weights that are all 0 stay 0, even
            if `epsilon` is 0. Defaults to `1e-20`.
        order: float, at least 1. Order of the norm; 1 is the sum. Defaults to
            `1`.

    Returns:
        `(T, K)`.

    Example:

    >>> weights = keras.ops.array([[3.0, 1.0], [0.0, 0.0]])
    >>> weights = keras_moe.ops.normalize_weights(weights)
    >>> keras.ops.convert_to_numpy(weights).tolist()
    [[0.75, 0.25], [0.0, 0.0]]
    """
    # Divided by the sum first, so that no power underflows, nor the square of
    # the norm in the gradient. (Not by the maximum, which is an error without
    # tokens and on the meta device of torch.)
    total = ops.stop_gradient(ops.sum(weights, axis=-1, keepdims=True))
    vanish = total < 1e-30
    total = ops.where(vanish, ops.ones_like(total), total)
    weights = weights / total
    if order == 1:
        norm = ops.sum(weights, axis=-1, keepdims=True)
    else:
        powers = ops.sum(ops.power(weights, order), axis=-1, keepdims=True)
        powers = ops.where(vanish, ops.ones_like(powers), powers)
        norm = ops.power(powers, 1 / order)
    norm = norm + epsilon / total
    return weights / ops.where(vanish, ops.ones_like(norm), norm)
