"""The inputs of a layer as one row per token, and their shapes."""

import inspect
import math
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_moe.ops.masking import zero_masked


class Tokens(NamedTuple):
    """The inputs of one call by token, or by example if routed per example.

    Fields:
        rows: `(T, D)`, or `(T, ..., D)` per example. Inputs of the experts.
        features: `(T, D)`. Each token as one vector.
        router_inputs: `(T, D)`, or of another width. Inputs of the router.
        mask: `(T,)` bool, or `None`.
        context: `(T,)` or `(T, C)`, or `None`.
        positions: The first axes of the inputs, whose entries are routed.
    """

    rows: Any
    features: Any
    router_inputs: Any
    mask: Any
    context: Any
    positions: Any


def to_tokens(inputs, mask, route_per, context=None, router_inputs=None):
    """The `Tokens` of the inputs of a layer.

    Args:
        inputs: `(batch, ..., D)`, in the layer's compute dtype.
        mask: Bool, of the shape of the positions or of their first axes.
        route_per: `"token"` or `"example"`.
        context: As `flatten_context` takes it.
        router_inputs: `(batch, ..., D)` of the same positions, or `None` for
            the inputs.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    all_positions = ops.shape(inputs)[:-1]
    positions = all_positions if route_per == "token" else all_positions[:1]
    if mask is not None:
        mask = flatten_mask(mask, all_positions)
    context = flatten_context(context, positions)
    seen = None
    if router_inputs is not None:
        _check_router_inputs(router_inputs, inputs)
        seen = _by_token(router_inputs, mask, route_per)[1]
    rows, features = _by_token(inputs, mask, route_per)
    if mask is not None and route_per == "example":
        shape = (all_positions[0], math.prod(all_positions[1:]))
        mask = ops.any(ops.reshape(mask, shape), axis=1)
    if seen is None:
        seen = features
    return Tokens(rows, features, seen, mask, context, positions)


def _by_token(inputs, mask, route_per):
    """`(rows, features)`: the experts' inputs, and one vector per token.

    Per example, the vector is the mean over the unmasked positions.
    """
    *positions, dim = ops.shape(inputs)
    flat = ops.reshape(inputs, (math.prod(positions), dim))
    flat = zero_masked(flat, mask)
    if route_per == "token":
        return flat, flat
    if mask is None:
        return inputs, ops.mean(inputs, axis=tuple(range(1, len(positions))))
    by_example = (positions[0], math.prod(positions[1:]))  # (B, L)
    # Half precision cannot hold the sums of long examples.
    is_float64 = keras.backend.standardize_dtype(inputs.dtype) == "float64"
    exact = flat if is_float64 else ops.cast(flat, "float32")
    count = ops.cast(ops.reshape(mask, by_example), exact.dtype)
    count = ops.sum(count, axis=1, keepdims=True)
    total = ops.sum(ops.reshape(exact, (*by_example, dim)), axis=1)
    features = ops.cast(total / ops.maximum(count, 1.0), inputs.dtype)
    return ops.reshape(flat, ops.shape(inputs)), features


def _check_router_inputs(router_inputs, inputs):
    given, positions = tuple(router_inputs.shape), tuple(inputs.shape[:-1])
    if len(given) != len(positions) + 1 or not _may_be(given[:-1], positions):
        raise ValueError(
            "`router_inputs` must have the shape of the inputs but for the "
            f"last axis. Received: router_inputs.shape={given}, "
            f"inputs.shape={tuple(inputs.shape)}"
        )


def _may_be(shape, other):
    """Whether two shapes of the same rank agree in all known sizes."""
    return all(
        a == b
        for a, b in zip(shape, other, strict=True)
        if isinstance(a, int) and isinstance(b, int)
    )


def flatten_mask(mask, positions):
    """A mask of the positions, or of their first axes, as `(T,)` bool."""
    mask = ops.cast(mask, "bool")
    rank = len(mask.shape)
    if not 1 <= rank <= len(positions) or not _may_be(
        mask.shape, positions[:rank]
    ):
        raise ValueError(
            "`mask` must have the shape of the inputs without their last "
            "axis, or of their first axes. Received: "
            f"mask.shape={tuple(mask.shape)}, positions {tuple(positions)}"
        )
    return ops.reshape(_spread(mask, positions), (math.prod(positions),))


def flatten_context(context, positions):
    """A context as one row per token.

    Whole numbers are ids, of the shape of the positions or of their first axes:
    `(T,)`. Other numbers have one more axis, of features: `(T, C)`.
    """
    if context is None:
        return None
    context = ops.convert_to_tensor(context)
    dtype = keras.backend.standardize_dtype(context.dtype)
    is_ids = _is_ids(dtype)
    rank = len(context.shape) - (0 if is_ids else 1)
    if not 1 <= rank <= len(positions) or not _may_be(
        context.shape[:rank], positions[:rank]
    ):
        raise ValueError(
            "`context` must be ids (whole numbers) of the shape of the inputs "
            "without their last axis, or of their first axes, or numbers with "
            "one more axis. Received: "
            f"context.shape={tuple(context.shape)}, dtype={dtype}, positions "
            f"{tuple(positions)}"
        )
    number = math.prod(positions)
    if is_ids:
        if dtype == "bool":
            context = ops.cast(context, "int32")
        return ops.reshape(_spread(context, positions), (number,))
    width = context.shape[-1]
    return ops.reshape(_spread(context, positions, width), (number, width))


def _is_ids(dtype):
    return dtype == "bool" or "int" in dtype


def _spread(x, positions, *features):
    rank = len(x.shape) - len(features)
    missing = (1,) * (len(positions) - rank)
    x = ops.reshape(x, (*ops.shape(x)[:rank], *missing, *features))
    return ops.broadcast_to(x, (*positions, *features))


def call_masked(layer, tokens, mask):
    """A layer on tokens `(T, ...)`, with their mask if it takes one.

    Keras passes `training` on by itself. Layers that read the positions of
    examples get no mask of examples; masked examples are just zero.
    """
    takes_mask = "mask" in inspect.signature(layer.call).parameters
    if mask is None or not takes_mask or len(tokens.shape) > 2:
        return layer(tokens)
    return layer(tokens, mask=mask)


def routing_spec(router, shape, route_per, training, context):
    """The routing of symbolic inputs of a shape, as symbolic tensors."""
    positions = shape[:-1] if route_per == "token" else shape[:1]
    num_tokens = None if None in positions else math.prod(positions)
    num_sequences = positions[0]
    if num_tokens is None:
        # Any number of tokens that makes whole groups.
        num_sequences = router.per if isinstance(router.per, int) else 2
    known = 2 * num_sequences if num_tokens is None else num_tokens
    kwargs = {}
    if router.uses_context:
        kwargs["context"] = _context_spec(context, known, router.compute_dtype)
    if router.looks_ahead:
        kwargs["num_sequences"] = num_sequences
    tokens = keras.KerasTensor((known, shape[-1]), dtype=router.compute_dtype)
    # A call, not `compute_output_spec`, since the router has its own dtype.
    routing = router(tokens, training=training, **kwargs)
    return keras.tree.map_structure(
        lambda x: keras.KerasTensor((num_tokens, *x.shape[1:]), dtype=x.dtype),
        routing,
    )


def _context_spec(context, num_tokens, dtype):
    """The result of `flatten_context` for a symbolic context."""
    if context is None:
        return None
    if _is_ids(context.dtype):
        dtype = "int32" if context.dtype == "bool" else context.dtype
        return keras.KerasTensor((num_tokens,), dtype=dtype)
    return keras.KerasTensor((num_tokens, context.shape[-1]), dtype=dtype)
