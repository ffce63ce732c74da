from keras import ops


def score(logits, activation):
    """Scores of the experts from their logits.

    Args:
        logits: `(T, E)`.
        activation: `"softmax"`, over the experts, or `"sigmoid"`, each expert
            on its own.

    Returns:
        `(T, E)`.
    """
    if activation == "softmax":
        return ops.softmax(logits, axis=-1)
    if activation == "sigmoid":
        return ops.sigmoid(logits)
    raise ValueError(
        "`activation` must be 'softmax' or 'sigmoid'. "
        f"Received: activation={activation!r}"
    )


def normalize_weights(weights, epsilon=1e-20):
    """`weights / (sum of each token's weights + epsilon)`.

    Args:
        weights: `(T, K)`, not negative.
        epsilon: float. Keeps tokens whose weights all underflow finite.

    Returns:
        `(T, K)`.
    """
    return weights / (ops.sum(weights, axis=-1, keepdims=True) + epsilon)
