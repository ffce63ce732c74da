"""Groups of consecutive tokens."""

from keras import ops

from keras_moe.checks import is_int


def check_per(per):
    """Raises unless `per` is `"batch"`, `"sequence"` or a positive int."""
    if per not in ("batch", "sequence") and not (is_int(per) and per > 0):
        raise ValueError(
            "`per` must be 'batch', 'sequence' or a positive int, a number of "
            f"sequences. Received: per={per!r}"
        )


def num_groups(per, num_sequences):
    """Number of groups of a batch.

    The `T` tokens of a batch are `num_sequences` sequences of equal length, one
    after the other. A group is one or more consecutive sequences.

    Args:
        per: `"batch"` for one group, `"sequence"` for one group per sequence,
            or an int, the number of sequences in a group.
        num_sequences: int, or an integer tensor.

    Returns:
        `G`, an int or an int32 tensor.

    Raises:
        ValueError: If `per` is not valid, or the int `num_sequences` is not a
            multiple of `per`.

    Example:

    >>> keras_moe.ops.num_groups("batch", 6), keras_moe.ops.num_groups(2, 6)
    (1, 3)
    """
    check_per(per)
    if per == "batch":
        return 1
    if per == "sequence":
        return num_sequences
    if isinstance(num_sequences, int) and num_sequences % per:
        raise ValueError(
            "The number of sequences must be a multiple of `per`. "
            f"Received: per={per}, num_sequences={num_sequences}"
        )
    groups = num_sequences // per
    if ops.is_tensor(num_sequences):
        # With 0 groups `to_groups` fails; otherwise it would mix sequences.
        whole = ops.equal(num_sequences % per, 0)
        groups = groups * ops.cast(whole, groups.dtype)
    return groups


def to_groups(x, groups):
    """Splits the first axis into groups: `(T, ...)` -> `(G, T / G, ...)`.

    Args:
        x: `(T, ...)`.
        groups: `G`, an int or an integer tensor, a divisor of `T`.

    Returns:
        `(G, T / G, ...)`.

    Example:

    >>> x = keras_moe.ops.to_groups(keras.ops.array([1, 2, 3, 4]), 2)
    >>> keras.ops.convert_to_numpy(x).tolist()
    [[1, 2], [3, 4]]
    """
    num_tokens, *shape = ops.shape(x)
    size = group_size(num_tokens, groups)
    return ops.reshape(x, (groups, size, *shape))


def group_size(num_tokens, groups):
    """Number of tokens in each group; all tokens if there are 0 groups."""
    if ops.is_tensor(groups):
        groups = ops.maximum(groups, 1)
    elif isinstance(groups, int):  # not a symbolic size of JAX
        groups = max(groups, 1)
    return num_tokens // groups
