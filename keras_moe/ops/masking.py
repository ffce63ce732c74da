from keras import ops


def masked_mean(values, mask=None):
    """Mean over the first axis, the tokens; 0 where there is no token.

    Args:
        values: `(T, ...)`.
        mask: `(T,)` bool, or `None`. `False` tokens do not count, whatever
            their values, NaN included.

    Returns:
        `(...)`, in the dtype of `values`.
    """
    if mask is None:
        count = ops.cast(ops.shape(values)[0], values.dtype)
    else:
        count = ops.sum(ops.cast(mask, values.dtype))
        mask = ops.reshape(mask, (-1,) + (1,) * (len(values.shape) - 1))
        values = ops.where(mask, values, ops.zeros_like(values))
    return ops.sum(values, axis=0) / ops.maximum(count, 1.0)
