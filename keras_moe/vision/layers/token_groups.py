"""Groups of tokens that take no notice of where an image ends."""

import math

from keras import ops

from keras_moe.moe.moe import MoE


def to_groups(x, size):
    """`(B, N, ...)` to `(G, size, ...)`, in the order of images and tokens.

    Returns:
        `(groups, mask)`. A last group that is not full is filled up with zeros,
        which `mask` `(G, size)` marks with `False`. It is `None` where all
        groups are known to be full.
    """
    batch, tokens, *rest = ops.shape(x)
    number = batch * tokens
    x = ops.reshape(x, (number, *rest))
    missing = -number % size
    if isinstance(missing, int) and not missing:
        return ops.reshape(x, (number // size, size, *rest)), None
    filling = ops.zeros((missing, *rest), dtype=x.dtype)
    x = ops.concatenate([x, filling], axis=0)
    # `arange` of a symbolic size has no dtype in an exported program of torch.
    is_token = [ops.ones((number,), "bool"), ops.zeros((missing,), "bool")]
    mask = ops.reshape(ops.concatenate(is_token), (-1, size))
    return ops.reshape(x, (-1, size, *rest)), mask


def from_groups(x, shape):
    """The tokens of `to_groups` back in the shape `(B, N, D)`."""
    number = math.prod(shape[:2])
    return ops.reshape(ops.reshape(x, (-1, shape[-1]))[:number], shape)


def groups_count(layer, training):
    """Whether what a token gets from a layer depends on its group."""
    if training or not isinstance(layer, MoE):
        return True
    return layer.capacity.limits(training=False) or layer.router.looks_ahead
