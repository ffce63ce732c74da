"""Grouped matmul on `keras.ops` alone: short, differentiable, memory-hungry.

It gathers the weights of every row, `(N, D, F)` in all: right on every device,
and cheap only for few rows.
"""

import keras
from keras import ops


def grouped_matmul(lhs, rhs, group_sizes):
    dtype = lhs.dtype
    if keras.backend.standardize_dtype(dtype) in ("bfloat16", "float16"):
        # The gradient of `take` would add up in half precision.
        lhs, rhs = ops.cast(lhs, "float32"), ops.cast(rhs, "float32")
    ends = ops.cumsum(group_sizes)
    row = ops.arange(ops.shape(lhs)[0], dtype="int32")
    group = ops.searchsorted(ends, row, side="right")
    in_a_group = ops.expand_dims(row < ends[-1], -1)  # (N, 1)
    group = ops.minimum(group, rhs.shape[0] - 1)
    # Unused rows are zeroed before and after the product, so that not even a
    # NaN in one reaches the gradient of `rhs`.
    lhs = ops.where(in_a_group, lhs, ops.zeros_like(lhs))
    out = ops.einsum("nd,ndf->nf", lhs, ops.take(rhs, group, axis=0))
    out = ops.where(in_a_group, out, ops.zeros_like(out))
    return ops.cast(out, dtype)
