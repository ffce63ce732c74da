"""Grouped matmul, its checks, and a batched matmul that keeps float64."""

import keras
from keras import ops

from keras_moe import backend


def grouped_matmul(lhs, rhs, group_sizes, implementation=None):
    """Matrix product of rows sorted by group with one matrix per group.

    `out[i] = lhs[i] @ rhs[g]` where `g` is the group of row `i`: the first
    `group_sizes[0]` rows belong to group 0, the next `group_sizes[1]` to group
    1 and so on. Groups may be empty. Rows after the last group give zero. No
    row, not even a NaN, changes the result or gradient of another group.
    Gradients are defined for `lhs` and `rhs`.

    Args:
        lhs: `(N, D)`, float32, bfloat16, float16 or float64.
        rhs: `(E, D, F)`, same dtype. `E`, `D` and `F` must be static.
        group_sizes: `(E,)` int32, with a sum of at most `N` (not checked).
        implementation: One of `grouped_matmul_implementations()`, or `None` for
            the first that suits the device and can run. Defaults to `None`.

    Returns:
        `(N, F)`, in the dtype of `lhs`.

    Raises:
        ValueError: If shapes or dtypes do not fit, or `implementation` is not
            known on this backend.
        NotImplementedError: If no implementation, or not the given one, can
            run here. The message gives each reason.

    Example:

    >>> lhs = keras.ops.ones((3, 2))
    >>> rhs = keras.ops.stack([keras.ops.ones((2, 1)), keras.ops.zeros((2, 1))])
    >>> out = keras_moe.ops.grouped_matmul(lhs, rhs, [1, 2])
    >>> keras.ops.convert_to_numpy(out)[:, 0].tolist()
    [2.0, 0.0, 0.0]
    """
    check_implementation(implementation, backend.GROUPED_MATMUL)
    lhs, rhs = ops.convert_to_tensor(lhs), ops.convert_to_tensor(rhs)
    group_sizes = ops.convert_to_tensor(group_sizes, dtype="int32")
    _check_operands(lhs, rhs, group_sizes)
    if implementation is None:
        names = backend.best_first(lhs)
    else:
        names = (implementation,)
    reasons = []
    for name in names:
        try:
            return backend.GROUPED_MATMUL[name](lhs, rhs, group_sizes)
        except NotImplementedError as error:
            reasons.append(f"{name!r}: {error}")
    raise NotImplementedError(
        f"`grouped_matmul` cannot run here: {'; '.join(reasons)}. "
        f"Received: implementation={implementation!r}, "
        f"lhs.shape={tuple(lhs.shape)}, rhs.shape={tuple(rhs.shape)}, "
        f"dtype={keras.backend.standardize_dtype(lhs.dtype)}"
    )


def _check_operands(lhs, rhs, group_sizes):
    shapes = (
        f"lhs.shape={tuple(lhs.shape)}, rhs.shape={tuple(rhs.shape)}, "
        f"group_sizes.shape={tuple(group_sizes.shape)}"
    )
    if (
        len(lhs.shape) != 2
        or len(rhs.shape) != 3
        or len(group_sizes.shape) != 1
    ):
        raise ValueError(
            "`lhs` must be of shape (N, D), `rhs` of shape (E, D, F) and "
            f"`group_sizes` of shape (E,). Received: {shapes}"
        )
    if lhs.shape[1] != rhs.shape[1] or rhs.shape[0] != group_sizes.shape[0]:
        raise ValueError(
            "`lhs` and `rhs` must agree on D, `rhs` and `group_sizes` on E. "
            f"Received: {shapes}"
        )
    if lhs.dtype != rhs.dtype:
        raise ValueError(
            "`lhs` and `rhs` must have the same dtype. "
            f"Received: lhs.dtype={lhs.dtype}, rhs.dtype={rhs.dtype}"
        )


def grouped_matmul_implementations():
    """Names that `implementation` takes on this backend, best first.

    Returns:
        tuple of str.

    Example:

    >>> "reference" in keras_moe.ops.grouped_matmul_implementations()
    True
    """
    return tuple(backend.GROUPED_MATMUL)


def check_implementation(implementation, names):
    """Raises unless `implementation` is `None` or one of the names."""
    if implementation is not None and implementation not in names:
        raise ValueError(
            "`implementation` must be None or, on this backend, one of "
            f"{grouped_matmul_implementations()}. "
            f"Received: implementation={implementation!r}"
        )


def check_operands_of(implementation, rhs_shape, dtype):
    """Raises if an implementation can never take these operands.

    Args:
        implementation: str, or `None` for any.
        rhs_shape: `(E, D, F)`.
        dtype: str.
    """
    reason = backend.refusal(implementation, rhs_shape, dtype)
    if reason:
        raise ValueError(
            f"`implementation` cannot compute these experts: {reason}. "
            f"Received: implementation={implementation!r}, a bank of shape "
            f"{tuple(rhs_shape)}, dtype={dtype}"
        )


def batch_matmul(x, y):
    """`(B, N, K)` times `(B, K, M)`, in the dtype of both.

    On TensorFlow `ops.matmul` and its gradient are faster than `ops.einsum`,
    but on torch it turns float64 into float32.
    """
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        return ops.einsum("bnk,bkm->bnm", x, y)
    return ops.matmul(x, y)
