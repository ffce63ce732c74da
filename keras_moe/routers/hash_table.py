"""Tables from the ids of tokens to experts."""

import numpy as np
from keras import ops


def balanced_table(num_ids, num_experts, top_k, seed):
    """A random table `(num_ids, top_k)` with each expert equally often.

    It is made in blocks of `num_experts` ids. In a block, each of the `top_k`
    columns runs through the same random order of the experts, from different
    starting points: each column has every expert once, and no id has one twice.
    """
    rng = np.random.default_rng(seed)
    blocks = -(-num_ids // num_experts)
    order = np.argsort(rng.random((blocks, num_experts)), axis=1)
    start = np.argsort(rng.random((blocks, num_experts)), axis=1)[:, :top_k]
    place = np.arange(num_experts)[None, :, None] + start[:, None, :]
    place = place % num_experts  # (blocks, num_experts, top_k)
    table = np.take_along_axis(order[:, :, None], place, axis=1)
    table = table.reshape(-1, top_k)[:num_ids]
    return table[rng.permutation(num_ids)].astype("int32")


def as_table(table, num_experts):
    """A given table as an int32 array `(num_ids, top_k)`."""
    table = np.array(ops.convert_to_numpy(table))
    if table.ndim == 1:
        table = table[:, None]
    if table.ndim != 2 or table.dtype.kind not in "iu" or table.size == 0:
        raise ValueError(
            "`table` must be an array of integers of shape (num_ids, top_k). "
            f"Received: table.shape={table.shape}, table.dtype={table.dtype}"
        )
    if table.min() < 0 or table.max() >= num_experts:
        raise ValueError(
            "`table` must contain experts from 0 to `num_experts - 1`. "
            f"Received: values from {table.min()} to {table.max()}, "
            f"num_experts={num_experts}"
        )
    return table.astype("int32")
