"""Order statistics over the tokens of all devices that train together."""

from keras import ops

from keras_moe import backend

_DIGITS = 256  # of 8 bits


def kth_largest(values, k):
    """The `k`-th largest of each column, over the rows of all devices.

    A float32 read as an int32 keeps its order, once the bits of negative ones
    are reversed. The digits of the result are found one after the other, the
    highest first, by counting on each device how often each digit occurs. Thus
    what is sent does not grow with the number of rows.

    Args:
        values: `(T, E)` float32, without NaN.
        k: int32 scalar, from 1 to the number of rows of all devices.

    Returns:
        `(E,)` float32, without a gradient.
    """
    num_columns = values.shape[-1]
    keys = _mirrored(ops.view(ops.stop_gradient(values), "int32"))
    columns = ops.arange(num_columns, dtype="int32") * _DIGITS
    found = ops.zeros((num_columns,), "int32")
    remaining = ops.broadcast_to(ops.cast(k, "int32"), (num_columns,))
    for shift in (24, 16, 8, 0):
        digits = ops.right_shift(keys, shift)
        if shift == 24:  # the digit with the sign
            digits = places = digits + _DIGITS // 2
        else:
            among = ops.equal(ops.right_shift(keys, shift + 8), found)
            digits = ops.bitwise_and(digits, _DIGITS - 1)
            places = ops.where(among, digits, _DIGITS * num_columns)
        counts = _counts(columns + places, num_columns)  # (E, 256)
        counts = backend.all_reduce_sum(counts)
        # Of each digit and those above it; fewer and fewer.
        at_least = ops.flip(ops.cumsum(ops.flip(counts, 1), axis=1), 1)
        reached = at_least >= ops.expand_dims(remaining, 1)
        digit = ops.sum(ops.cast(reached, "int32"), axis=1) - 1
        is_digit = ops.equal(
            ops.arange(_DIGITS, dtype="int32"), ops.expand_dims(digit, 1)
        )
        above = ops.where(is_digit, at_least - counts, ops.zeros_like(counts))
        remaining = remaining - ops.sum(above, axis=1)
        if shift == 24:
            digit = digit - _DIGITS // 2
        found = found * _DIGITS + digit
    return ops.view(_mirrored(found), "float32")


def _mirrored(keys):
    return ops.where(keys < 0, ops.bitwise_xor(keys, 0x7FFFFFFF), keys)


def _counts(places, num_columns):
    size = num_columns * _DIGITS
    places = ops.reshape(ops.minimum(places, size), (-1,))
    ones = ops.ones_like(places)
    counts = ops.segment_sum(ones, places, num_segments=size + 1)[:-1]
    return ops.reshape(counts, (num_columns, _DIGITS))
