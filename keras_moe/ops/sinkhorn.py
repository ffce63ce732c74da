"""Sinkhorn's algorithm, which balances a matrix of scores."""

import math

import keras
from keras import ops

from keras_moe.checks import check_int

# Not minus infinity: a difference of two would be NaN.
LOWEST = -1e30


def sinkhorn(logits, num_iterations=20, mask=None):
    """Scales `exp(logits)` until tokens and experts have equal shares.

    ```
    matrix = exp(logits)
    repeat num_iterations times:
        matrix = matrix / (sum over experts * T)
        matrix = matrix / (sum over tokens * E)
    ```

    The result sums to 1. Its columns sum to `1 / E`, its rows to about `1 / T`,
    closer with more iterations. It is computed with logarithms, so that no
    logit is too large, and the loop is unrolled.

    Args:
        logits: `(..., T, E)`. Each matrix is scaled on its own.
        num_iterations: int. Defaults to `20`.
        mask: `(..., T)` bool, or `None`. The rows of `False` tokens are zero,
            and `T` counts the other tokens. Defaults to `None`.

    Returns:
        `(..., T, E)` float32, or float64 if `logits` are.

    Raises:
        ValueError: If `num_iterations` is not a positive int.

    Example:

    >>> matrix = keras_moe.ops.sinkhorn([[3.0, 0.0], [5.0, 0.0]])
    >>> [round(float(x), 3) for x in keras.ops.sum(matrix, axis=0)]
    [0.5, 0.5]

    Reference:

    - [Sinkhorn and Knopp, 1967](https://doi.org/10.2140/pjm.1967.21.343)
    - [Clark et al., 2022](https://arxiv.org/abs/2202.01169), section 2 (S-BASE)
    """
    check_int("num_iterations", num_iterations, minimum=1)
    logits = ops.convert_to_tensor(logits)
    if keras.backend.standardize_dtype(logits.dtype) != "float64":
        logits = ops.cast(logits, "float32")
    num_experts = logits.shape[-1]
    if mask is None:
        keep = None
        num_tokens = ops.shape(logits)[-2]
        log_tokens = ops.log(ops.cast(num_tokens, logits.dtype))
    else:
        keep = ops.expand_dims(ops.cast(mask, "bool"), -1)  # (..., T, 1)
        logits = ops.where(keep, logits, ops.zeros_like(logits))
        num_tokens = ops.sum(ops.cast(keep, logits.dtype), -2, keepdims=True)
        # Not `ops.maximum`, which turns float64 into float32 on torch.
        none = ops.equal(num_tokens, 0)
        log_tokens = ops.log(
            ops.where(none, ops.ones_like(num_tokens), num_tokens)
        )
    columns = ops.zeros_like(ops.sum(logits, axis=-2, keepdims=True))
    rows = ops.zeros_like(logits[..., :1])
    for _ in range(num_iterations):
        rows = -log_tokens - _log_sum(logits + columns, -1)  # (..., T, 1)
        if keep is not None:
            rows = ops.where(keep, rows, ops.full_like(rows, LOWEST))
        columns = -math.log(num_experts) - _log_sum(logits + rows, -2)
    matrix = ops.exp(logits + rows + columns)
    if keep is not None:
        matrix = ops.where(keep, matrix, ops.zeros_like(matrix))
    return matrix


def _log_sum(x, axis):
    return ops.logsumexp(x, axis=axis, keepdims=True)
