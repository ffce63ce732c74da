"""Groups of tokens, next to each other."""

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
    """Number of groups that tokens are looked at in.

    The `T` tokens of a batch are `num_sequences` sequences of equal length, one
    after the other; a group is some of them, next to each other.

    Args:
        per: `"batch"` for one group, `"sequence"` for one a sequence, or an
            int, the number of sequences in a group.
        num_sequences: int, or an integer tensor.

    Returns:
        `G`, an int or an int32 tensor.

    Raises:
        ValueError: If the sequences do not make up whole groups, where their
            number is known.

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
        # No group at all makes `to_groups` fail, rather than mix sequences.
        whole = ops.equal(num_sequences % per, 0)
        groups = groups * ops.cast(whole, groups.dtype)
    return groups


def to_groups(x, groups):
    """`(T, ...)` -> `(G, T / G, ...)`.

    Args:
        x: `(T, ...)`.
        groups: `G`, an int or an integer tensor, a divisor of `T`.

    Returns:
        `(G, T / G, ...)`.
    """
    num_tokens, *shape = ops.shape(x)
    size = group_size(num_tokens, groups)
    return ops.reshape(x, (groups, size, *shape))


def group_size(num_tokens, groups):
    """Tokens of each group; 0 where there is no group."""
    if ops.is_tensor(groups):
        groups = ops.maximum(groups, 1)
    elif isinstance(groups, int):  # not a symbolic size of JAX
        groups = max(groups, 1)
    return num_tokens // groups
