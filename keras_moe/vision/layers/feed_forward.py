"""Calls the feed-forward layer of a block, in groups or by image if asked."""

import inspect

from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.moe.moe import MoE
from keras_moe.moe.part_arguments import as_layer
from keras_moe.vision.layers.token_groups import from_groups
from keras_moe.vision.layers.token_groups import to_groups


def as_feed_forward(feed_forward, group_size, route_per):
    """The layer, if it can take what the arguments of a block ask for."""
    check_one_of("route_per", route_per, ("token", "image"))
    if group_size is not None:
        check_int("group_size", group_size, 1)
    if feed_forward is None:
        raise ValueError(
            "`feed_forward` must be a layer. Received: feed_forward=None"
        )
    feed_forward = as_layer("feed_forward", feed_forward)
    takes = inspect.signature(feed_forward.call).parameters
    if group_size is not None and "mask" not in takes:
        raise ValueError(
            "With `group_size`, `feed_forward` must take a mask. "
            f"Received: feed_forward={feed_forward!r}"
        )
    if route_per == "image" and "router_inputs" not in takes:
        raise ValueError(
            "With `route_per='image'`, `feed_forward` must be a MoE. "
            f"Received: feed_forward={feed_forward!r}"
        )
    return feed_forward


def call_feed_forward(
    layer, x, group_size, route_per, context=None, training=None
):
    """What the layer makes of tokens `(B, N, D)`.

    Args:
        layer: A layer that `as_feed_forward` took.
        x: `(B, N, D)`.
        group_size, route_per: As for `keras_moe.layers.EncoderBlock`.
        context: `(B,)` ids, or `None`.
        training: bool. Keras passes it on to the layer by itself.
    """
    batch, tokens, dim = ops.shape(x)
    kwargs = {}
    if context is not None:
        context = ops.expand_dims(context, -1)
        kwargs["context"] = ops.broadcast_to(context, (batch, tokens))
    if route_per == "image":
        mean = ops.mean(x, axis=1, keepdims=True)
        kwargs["router_inputs"] = ops.broadcast_to(mean, ops.shape(x))
    if group_size in (None, tokens) or not _groups_count(layer, training):
        return layer(x, **kwargs)
    groups = {
        name: to_groups(value, group_size)
        for name, value in (("inputs", x), *kwargs.items())
    }
    x, mask = groups.pop("inputs")
    kwargs = {name: value for name, (value, _) in groups.items()}
    x = layer(x, mask=mask, **kwargs)
    return from_groups(x, (batch, tokens, dim))


def _groups_count(layer, training):
    """Whether what a token gets depends on its group."""
    if training or not isinstance(layer, MoE):
        return True
    return layer.capacity.limits(training=False) or layer.router.looks_ahead
