"""Turning what a layer is called with into one row a token."""

import inspect
import math

import keras
from keras import ops

from keras_moe.experts import Experts
from keras_moe.ops.masking import zero_masked


def routed_positions(inputs, route_per):
    """Shape of what is routed: all positions, or the examples alone."""
    return ops.shape(inputs)[: -1 if route_per == "token" else 1]


def to_tokens(inputs, mask, route_per):
    """`(features, tokens, mask)`: what is routed by, what is sent, `(T,)` bool.

    Per token both are `(T, D)`. Per example what is sent are the inputs, and
    what is routed by is their mean over the positions that are not masked.
    """
    if mask is not None:
        mask = flatten_mask(mask, ops.shape(inputs)[:-1])
    dim = inputs.shape[-1]
    if route_per == "token":
        tokens = zero_masked(ops.reshape(inputs, (-1, dim)), mask)
        return tokens, tokens, mask
    if mask is None:
        axes = tuple(range(1, len(inputs.shape) - 1))
        return ops.mean(inputs, axis=axes), inputs, None
    flat = zero_masked(ops.reshape(inputs, (-1, dim)), mask)
    mask = ops.reshape(mask, (ops.shape(inputs)[0], -1))  # (B, L)
    # Sums of long examples are too much for half precision.
    half = keras.backend.standardize_dtype(inputs.dtype) != "float64"
    exact = ops.cast(flat, "float32") if half else flat
    count = ops.sum(ops.cast(mask, exact.dtype), axis=1, keepdims=True)
    total = ops.sum(ops.reshape(exact, (*ops.shape(mask), dim)), axis=1)
    features = ops.cast(total / ops.maximum(count, 1.0), inputs.dtype)
    return features, ops.reshape(flat, ops.shape(inputs)), ops.any(mask, axis=1)


def call_masked(layer, tokens, mask):
    """A layer on tokens `(T, D)`, with their mask if it takes one.

    Keras hands `training` on by itself. A mask of examples says nothing to a
    layer that looks at their positions: then what is masked is just zero.
    """
    takes_mask = "mask" in inspect.signature(layer.call).parameters
    if mask is None or not takes_mask or len(tokens.shape) > 2:
        return layer(tokens)
    return layer(tokens, mask=mask)


def match_rank(x, like):
    """`x` with axes of size 1 behind its own, in the dtype of `like`."""
    missing = (1,) * (len(like.shape) - len(x.shape))
    return ops.cast(ops.reshape(x, (*ops.shape(x), *missing)), like.dtype)


def flatten_mask(mask, positions):
    """A mask of the positions, or of their first axes, as `(T,)` bool."""
    mask = ops.cast(mask, "bool")
    if len(mask.shape) > len(positions):
        raise ValueError(
            "`mask` must have the shape of the inputs without their last "
            "axis, or of their first axes. Received: "
            f"mask.shape={tuple(mask.shape)}, positions {tuple(positions)}"
        )
    return ops.reshape(_spread(mask, positions), (-1,))


def flatten_context(context, positions):
    """A context as one row a token.

    Whole numbers are ids, of the shape of the positions or of their first axes:
    `(T,)`. Other numbers have an axis of features behind that: `(T, C)`.
    """
    if context is None:
        return None
    context = ops.convert_to_tensor(context)
    dtype = keras.backend.standardize_dtype(context.dtype)
    is_ids = _is_ids(dtype)
    rank = len(context.shape) - (0 if is_ids else 1)
    if not 1 <= rank <= len(positions):
        raise ValueError(
            "`context` must be ids (whole numbers) of the shape of the inputs "
            "without their last axis, or of their first axes, or numbers with "
            "one more axis. Received: "
            f"context.shape={tuple(context.shape)}, dtype={dtype}, positions "
            f"{tuple(positions)}"
        )
    if is_ids:
        if dtype == "bool":
            context = ops.cast(context, "int32")
        return ops.reshape(_spread(context, positions), (-1,))
    features = context.shape[-1]
    return ops.reshape(_spread(context, positions, features), (-1, features))


def context_spec(context, num_tokens, dtype):
    """What `flatten_context` will make of a symbolic context."""
    if context is None:
        return None
    if _is_ids(context.dtype):
        dtype = "int32" if context.dtype == "bool" else context.dtype
        return keras.KerasTensor((num_tokens,), dtype=dtype)
    return keras.KerasTensor((num_tokens, context.shape[-1]), dtype=dtype)


def _is_ids(dtype):
    return dtype == "bool" or "int" in dtype


def _spread(x, positions, *features):
    rank = len(x.shape) - len(features)
    missing = (1,) * (len(positions) - rank)
    x = ops.reshape(x, (*ops.shape(x)[:rank], *missing, *features))
    return ops.broadcast_to(x, (*positions, *features))


def tokens_shape(layer, input_shape):
    """What is sent to the experts, without the copies."""
    if layer.route_per == "example":
        return (None, *input_shape[1:])
    return (None, input_shape[-1])


def shape_behind(part, shape):
    """Output shape of a part, which experts of one's own need not tell."""
    tells = isinstance(part, Experts) or not hasattr(part, "num_experts")
    if part is None or not tells:
        return shape
    return tuple(part.compute_output_shape(shape))


def output_shape(layer, input_shape):
    shape = tokens_shape(layer, input_shape)
    for part in (layer.pre_experts, layer.experts, layer.post_experts):
        shape = shape_behind(part, shape)
    kept = 1 if layer.route_per == "example" else -1
    return (*input_shape[:kept], *shape[1:])


def output_spec(layer, inputs, training, context):
    """What the layer returns, as symbolic tensors."""
    outputs = keras.KerasTensor(
        output_shape(layer, inputs.shape), dtype=layer.compute_dtype
    )
    if not layer.return_routing:
        return outputs
    positions = routed_positions(inputs, layer.route_per)
    num_tokens = None if None in positions else math.prod(positions)
    router = layer.router
    # Where the number of tokens is not known, any that makes whole groups.
    per = getattr(router, "per", None)
    sequences = per if isinstance(per, int) else 2
    if num_tokens is not None:
        sequences = positions[0]
    known = 2 * sequences if num_tokens is None else num_tokens
    kwargs = {}
    if getattr(router, "uses_context", False):
        kwargs["context"] = context_spec(context, known, router.compute_dtype)
    if getattr(router, "looks_ahead", False):
        kwargs["num_sequences"] = sequences
    tokens = keras.KerasTensor(
        (known, inputs.shape[-1]), dtype=router.compute_dtype
    )
    # Called, not asked for its specification: it has a dtype of its own.
    routing = router(tokens, training=training, **kwargs)
    routing = keras.tree.map_structure(
        lambda x: keras.KerasTensor((num_tokens, *x.shape[1:]), dtype=x.dtype),
        routing,
    )
    return outputs, routing


def check_width(layer, rows, tokens_shape):
    """Raises unless the experts returned what they were taken to return."""
    expected = shape_behind(layer.experts, tokens_shape)[-1]
    if rows.shape[-1] != expected:
        raise ValueError(
            "`experts` that are not a `keras_moe.experts.Experts` must keep "
            f"the width of their rows. Received rows of width {expected}, "
            f"returned {rows.shape[-1]}"
        )
