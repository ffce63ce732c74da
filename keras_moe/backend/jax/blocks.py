"""Cutting the rows of each group into blocks of few static sizes.

A compiled loop needs static shapes, and groups are as long as the data says. So
each group gets blocks of a full size, and what is left blocks of the smaller
sizes; the last block of a group reaches beyond its end. Measured on CPU: a
block costs as much as tens of rows before it computes anything, since it copies
the weights of its group, and each size is one more loop to compile.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

LARGEST = 544  # products of more rows are not faster
FOR_ANY_NUMBER = (64, 8)  # where the number of rows is symbolic


def platform_of(tensor):
    """`"cpu"`, `"gpu"` or `"tpu"`: where what is computed with it will run."""
    if not isinstance(tensor, jax.core.Tracer) and isinstance(
        tensor, jax.Array
    ):
        (platform,) = {device.platform for device in tensor.devices()}
    else:
        # A tracer does not know its device.
        device = jax.config.jax_default_device
        platform = getattr(device, "platform", device) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def block_sizes(num_rows, num_groups):
    """Rows of the blocks, largest first.

    If the groups are equal but for chance, nine of ten fit in one full block.
    """
    average = max(num_rows // num_groups, 1)
    full = average + 1.3 * math.sqrt(average)
    unit = 8 if full <= 32 else 16
    full = min(unit * math.ceil(full / unit), LARGEST)
    sizes = [full]
    while len(sizes) < 3 and sizes[-1] >= 64:
        sizes.append(sizes[-1] // 64 * 16)  # a quarter
    return tuple(sorted({min(size, num_rows) for size in sizes}, reverse=True))


def loops(group_sizes, num_rows):
    """Yields `(size, num_blocks, locate)`, one loop for each size of blocks.

    `locate(i)` gives of block `i` its group, its first row and which of its
    rows are its own, `(size,)`. There must be as many rows as the largest block
    has.
    """
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    left, first_rows = group_sizes, ends - group_sizes
    known = isinstance(num_rows, int)
    sizes = block_sizes(num_rows, num_groups) if known else FOR_ANY_NUMBER
    for size in sizes:
        counts = left // size
        rest = left - counts * size
        # One block more, if that is better than many smaller ones.
        counts += rest > (0 if size == sizes[-1] else size // 2)
        last = jnp.cumsum(counts)
        most = num_rows // size + num_groups
        number = jnp.arange(min(most, num_rows) if known else most)
        # Looked up for all blocks at once: a loop takes its time to do it.
        group = jnp.searchsorted(last, number, "right", method="compare_all")
        group = jnp.minimum(group, num_groups - 1)
        in_group = number - (last - counts)[group]
        start = first_rows[group] + in_group * size
        table = jnp.stack([group, start, ends[group]], axis=1)
        yield size, last[-1], _locate(table.astype("int32"), size, num_rows)
        taken = jnp.minimum(counts * size, left)
        left, first_rows = left - taken, first_rows + taken


def pad(x):
    """`x` with more rows, so that a symbolic number is enough for a block."""
    return jnp.pad(x, ((0, FOR_ANY_NUMBER[0]),) + ((0, 0),) * (x.ndim - 1))


def _locate(table, size, num_rows):
    def locate(i):
        group, start, stop = table[i]
        # A block may reach beyond the last row: move it up.
        first = jnp.minimum(start, num_rows - size)
        row = first + jnp.arange(size, dtype="int32")
        return group, first, (row >= start) & (row < stop)

    return locate


def accumulation_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def matmul(lhs, rhs, lhs_axis=1, rhs_axis=0):
    """Contracts one axis of each, in float32 at least."""
    return lax.dot_general(
        lhs,
        rhs,
        (((lhs_axis,), (rhs_axis,)), ((), ())),
        preferred_element_type=accumulation_dtype(lhs.dtype),
    )


def of_group(bank, group):
    return lax.dynamic_index_in_dim(bank, group, keepdims=False)


def add_to_group(bank, value, group):
    value = of_group(bank, group) + value
    return lax.dynamic_update_index_in_dim(bank, value, group, axis=0)


def read_rows(x, first, size):
    return lax.dynamic_slice_in_dim(x, first, size, axis=0)


def write_rows(x, rows, first, own):
    """Writes the rows that are the block's own, and leaves the others."""
    rows = keep_own(rows, own, read_rows(x, first, own.shape[0]))
    return lax.dynamic_update_slice_in_dim(x, rows, first, axis=0)


def keep_own(rows, own, others=0):
    """Not a product: zero times a NaN of another group is NaN."""
    own = own.reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.where(own, rows, others).astype(rows.dtype)
