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
        return ops.softmax(logits, axis=-1)
    if activation == "sigmoid":
        return ops.sigmoid(logits)
    if activation == "sqrt_softplus":
        # The gradient of the root is infinite at 0.
        return ops.sqrt(ops.maximum(ops.softplus(logits), 1e-30))
    raise ValueError(
        f"`activation` must be one of {SCORE_ACTIVATIONS}. "
        f"Received: activation={activation!r}"
    )


def normalize_weights(weights, epsilon=1e-20, order=1):
    """`weights / (order-norm of each token's weights + epsilon)`.

    Args:
        weights: `(T, K)`, not negative.
        epsilon: float. Keeps tokens whose weights all underflow finite.
        order: float, at least 1. Order of the norm; 1 is the sum.

    Returns:
        `(T, K)`.
    """
    if order == 1:
        norm = ops.sum(weights, axis=-1, keepdims=True)
    else:
        # Scaled by the largest, so that no power underflows.
        largest = ops.max(weights, axis=-1, keepdims=True)
        largest = ops.maximum(ops.stop_gradient(largest), 1e-30)
        powers = ops.power(weights / largest, order)
        total = ops.maximum(ops.sum(powers, axis=-1, keepdims=True), 1e-30)
        norm = largest * ops.power(total, 1 / order)
    return weights / (norm + epsilon)
