"""What routers hand on from layer to layer."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_moe.ops.masking import zero_masked


class StatefulRouting(NamedTuple):
    """A `Routing` with what the router of the next layer takes as its context.

    Fields:
        logits: `(T, E)`. Raw scores.
        probs: `(T, E)`. Scores that the weights come from.
        expert_indices: `(T, K)` int32. The chosen experts.
        expert_weights: `(T, K)`. Their weights.
        state: `(T, C)`, as of `MLPRouter.state`.
    """

    logits: Any
    probs: Any
    expert_indices: Any
    expert_weights: Any
    state: Any


def as_state(context, tokens, width, mask):
    """The state of the layer before, `(T, width)`, zeros in the first layer.

    Args:
        context: `(T, width)`, or `None` in the first layer.
        tokens: `(T, D)`.
        width: int.
        mask: `(T,)` bool, or `None`. `False` tokens get zeros.
    """
    if context is None:
        return ops.tile(ops.zeros_like(tokens[:, :1]), (1, width))
    dtype = keras.backend.standardize_dtype(tokens.dtype)
    context = ops.cast(ops.convert_to_tensor(context), dtype)
    if len(context.shape) != 2 or context.shape[-1] != width:
        raise ValueError(
            "`context` must be of the shape (T, projection_dim) or (T, E) "
            f"of the state of a router like this one, (T, {width}). "
            f"Received: context.shape={tuple(context.shape)}"
        )
    return zero_masked(context, mask)
