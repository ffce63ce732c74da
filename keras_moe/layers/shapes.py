"""Shapes on the way through a layer that joins routers and experts."""

import math

import keras

from keras_moe.experts import Experts
from keras_moe.layers.flatten import context_spec
from keras_moe.layers.flatten import routed_positions


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
