"""Zeros for masked tokens, and sums and means over the others."""

from keras import ops

from keras_moe import backend
from keras_moe.ops.groups import to_groups


def masked_mean(values, mask=None, all_reduce=False):
    """Mean over the tokens, the first axis; 0 if there are none.

    Args:
        values: `(T, ...)`.
        mask: `(T,)` bool, or `None`. `False` tokens do not count, even if they
            are NaN. Defaults to `None`.
        all_reduce: bool. Whether the tokens of all devices that train together
            count, as in a loss of the whole batch. Each device must then call
            this function. Defaults to `False`.

    Returns:
        `(...)`, in the dtype of `values`.

    Example:

    >>> values = keras.ops.array([1.0, 3.0, 8.0])
    >>> mask = keras.ops.array([True, True, False])
    >>> float(keras_moe.ops.masked_mean(values, mask))
    2.0
    """
    if mask is None:
        count = ops.cast(ops.shape(values)[0], values.dtype)
    else:
        count = ops.sum(ops.cast(mask, values.dtype))
        values = zero_masked(values, mask)
    total = ops.sum(values, axis=0)
    if all_reduce:
        total = backend.all_reduce_sum(total)
        count = backend.all_reduce_sum(count)
    return total / ops.maximum(count, 1.0)


def zero_masked(values, mask=None):
    """`values` with zeros for the masked tokens.

    Apply it to the input of a computation. A NaN that is only removed from the
    output comes back in the gradient.

    Args:
        values: `(T, ...)`.
        mask: `(T,)` bool, or `None`.

    Returns:
        `(T, ...)`.
    """
    if mask is None:
        return values
    mask = ops.reshape(mask, (-1,) + (1,) * (len(values.shape) - 1))
    return ops.where(mask, values, ops.zeros_like(values))


def token_counts(mask, groups, all_reduce=False):
    """Number of tokens of each group that are not masked.

    Args:
        mask: `(T,)` bool.
        groups: `G`, an int or an integer tensor.
        all_reduce: bool. Whether the tokens of all devices that train together
            count; for one group. Defaults to `False`.

    Returns:
        `(G,)` float32.
    """
    counts = ops.sum(to_groups(ops.cast(mask, "float32"), groups), axis=1)
    return backend.all_reduce_sum(counts) if all_reduce else counts


def group_means(values, mask, groups, all_reduce=False):
    """Mean over the tokens of each group; 0 for a group without tokens.

    Args:
        values: `(T, ...)` float32.
        mask: `(T,)` bool, or `None`. `False` tokens do not count, even if
            they are NaN.
        groups: `G`, an int or an integer tensor.
        all_reduce: bool. Whether the tokens of all devices that train together
            count; for one group. Defaults to `False`.

    Returns:
        `(G, ...)`.
    """
    if mask is None and isinstance(groups, int) and groups == 1:
        mean = masked_mean(values, all_reduce=all_reduce)
        return ops.expand_dims(mean, 0)
    if mask is None:
        mask = ops.ones((ops.shape(values)[0],), "bool")
    totals = ops.sum(to_groups(zero_masked(values, mask), groups), axis=1)
    if all_reduce:
        totals = backend.all_reduce_sum(totals)
    counts = ops.maximum(token_counts(mask, groups, all_reduce), 1.0)
    return totals / ops.reshape(counts, (-1,) + (1,) * (len(values.shape) - 1))
