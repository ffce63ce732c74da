"""Which rows belong to which expert."""

from keras import ops


def bounds(group_sizes):
    """The first row of each expert and the row after its last, `(E,)` int32."""
    group_sizes = ops.cast(group_sizes, "int32")
    ends = ops.cast(ops.cumsum(group_sizes), "int32")
    return ends - group_sizes, ends


def clear_unused_rows(rows, group_sizes):
    """The rows, with zeros for unused rows, which come after all groups.

    Applied to the input of a bank, so that unused rows change no gradient, even
    if they are NaN.
    """
    _, ends = bounds(group_sizes)
    row = ops.arange(ops.shape(rows)[0], dtype="int32")
    in_a_group = spread(row < ends[-1], rows)
    return ops.where(in_a_group, rows, ops.zeros_like(rows))


def spread(flags, rows):
    """`(N,)` -> `(N, 1, ...)`, with the rank of the rows."""
    return ops.reshape(flags, (-1,) + (1,) * (len(rows.shape) - 1))
