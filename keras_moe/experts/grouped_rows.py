"""Which rows belong to which expert."""

from keras import ops


def bounds(group_sizes):
    """`(starts, ends)`, `(E,)` int32 each."""
    group_sizes = ops.cast(group_sizes, "int32")
    ends = ops.cast(ops.cumsum(group_sizes), "int32")
    return ends - group_sizes, ends


def clear_unused_rows(rows, group_sizes):
    """The rows, with zeros for the unused ones, after those of all experts.

    Applied to the input of a bank, so that nothing that unused rows hold, NaN
    included, reaches a gradient.
    """
    _, ends = bounds(group_sizes)
    row = ops.arange(ops.shape(rows)[0], dtype="int32")
    in_a_group = spread(row < ends[-1], rows)
    return ops.where(in_a_group, rows, ops.zeros_like(rows))


def spread(flags, rows):
    """`(N,)` -> `(N, 1, ...)`, of the rank of the rows."""
    return ops.reshape(flags, (-1,) + (1,) * (len(rows.shape) - 1))
