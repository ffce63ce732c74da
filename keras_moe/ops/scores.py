"""Scores of the experts from logits, and weights from scores."""

from keras import ops

SCORE_ACTIVATIONS = ("softmax", "sigmoid", "sqrt_softplus")


def score(logits, activation):
    """Scores of the experts from their logits.

    Args:
        logits: `(T, E)`.
        activation: `"softmax"`, over the experts, or for each expert on its own
            `"sigmoid"` or `"sqrt_softplus"`, `sqrt(log(1 + exp(logits)))`.

    Returns:
        `(T, E)`, not negative.
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
    """`ops.softmax`, without the warning that over one number it is one."""
    if x.shape[axis] == 1:
        return ops.ones_like(x)
    return ops.softmax(x, axis=axis)


def rankable(scores):
    """The scores, with no NaN and nothing below -1e30.

    In a choice where minus infinity stands for what is out of the question, all
    else then comes first.
    """
    lowest = ops.full_like(scores, -1e30)
    return ops.where(scores > lowest, scores, lowest)


def normalize_weights(weights, epsilon=1e-20, order=1):
    """`weights / (order-norm of each token's weights + epsilon)`.

    Args:
        weights: `(T, K)`, not negative.
        epsilon: float. Added to the norm. Tokens whose weights are all 0 keep
            them, whatever it is.
        order: float, at least 1. Order of the norm; 1 is the sum.

    Returns:
        `(T, K)`.
    """
    # Over their sum first, so that neither a power nor, in the gradient, the
    # square of the norm underflows. (The largest would do as well, but a
    # maximum of no token, or on the meta device of torch, is an error.)
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
