"""Calls the feed-forward layers of a block, in groups or by image if asked."""

import inspect

from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.moe.part_arguments import as_layer
from keras_moe.vision.layers.token_groups import from_groups
from keras_moe.vision.layers.token_groups import groups_count
from keras_moe.vision.layers.token_groups import to_groups


def as_feed_forward(feed_forward, group_size, route_per):
    """The layer, or list of layers, if it can take what a block asks for."""
    check_one_of("route_per", route_per, ("token", "image"))
    if group_size is not None:
        check_int("group_size", group_size, 1)
    if isinstance(feed_forward, (list, tuple)):
        found = [as_layer("feed_forward", layer) for layer in feed_forward]
    else:
        found = as_layer("feed_forward", feed_forward)
    members = members_of(found)
    if not members or None in members:
        raise ValueError(
            "`feed_forward` must be a layer or a list of layers. "
            f"Received: feed_forward={feed_forward!r}"
        )
    for layer in members:
        if group_size is not None and not takes(layer, "mask"):
            raise ValueError(
                "With `group_size`, `feed_forward` must take a mask. "
                f"Received: feed_forward={layer!r}"
            )
        if route_per == "image" and not takes(layer, "router_inputs"):
            raise ValueError(
                "With `route_per='image'`, `feed_forward` must be a MoE. "
                f"Received: feed_forward={layer!r}"
            )
    return found


def members_of(feed_forward):
    """The layers of an ensemble's members, one without an ensemble."""
    return feed_forward if isinstance(feed_forward, list) else [feed_forward]


def call_feed_forward(
    feed_forward,
    x,
    group_size=None,
    route_per="token",
    context=None,
    mask=None,
    training=None,
    router_inputs=None,
):
    """What the layer makes of tokens `(B, N, D)`, or the layers of members.

    Args:
        feed_forward: What `as_feed_forward` gave.
        x: `(B, N, D)`.
        group_size, route_per: As for `keras_moe.layers.EncoderBlock`.
        context: `(B,)` or `(B, N)` ids, or `None`.
        mask: `(B, N)` bool, or `None`.
        training: bool. Keras passes it on to the layers by itself.
        router_inputs: `(B, N, ...)`, what a router sees, or `None` for `x`.
    """
    of_tokens = {
        "context": context,
        "mask": mask,
        "router_inputs": router_inputs,
    }
    of_tokens = {k: v for k, v in of_tokens.items() if v is not None}
    options = group_size, route_per, training
    layers = members_of(feed_forward)
    number = len(layers)
    if number == 1:
        return _of_member(layers[0], x, of_tokens, *options)

    def by_member(value):
        return ops.reshape(value, (-1, number, *ops.shape(value)[1:]))

    images = by_member(x)
    of_tokens = {k: by_member(v) for k, v in of_tokens.items()}
    outputs = [
        _of_member(
            layer,
            images[:, i],
            {k: v[:, i] for k, v in of_tokens.items()},
            *options,
        )
        for i, layer in enumerate(layers)
    ]
    return ops.reshape(ops.stack(outputs, axis=1), ops.shape(x))


def _of_member(layer, x, of_tokens, group_size, route_per, training):
    kwargs = dict(of_tokens)
    batch, tokens, dim = ops.shape(x)
    if not takes(layer, "mask"):
        kwargs.pop("mask", None)
    if "context" in kwargs and len(kwargs["context"].shape) == 1:
        context = ops.expand_dims(kwargs["context"], -1)
        kwargs["context"] = ops.broadcast_to(context, (batch, tokens))
    if route_per == "image":
        if "mask" in kwargs:
            raise ValueError(
                "`token_mask` does not go with `route_per='image'`, where "
                "the mean is over all tokens. Received both."
            )
        seen = kwargs.get("router_inputs", x)
        mean = ops.mean(seen, axis=1, keepdims=True)
        kwargs["router_inputs"] = ops.broadcast_to(mean, ops.shape(seen))
    if group_size in (None, tokens) or not groups_count(layer, training):
        return layer(x, **kwargs)
    x, is_token = to_groups(x, group_size)
    kwargs = {k: to_groups(v, group_size)[0] for k, v in kwargs.items()}
    # What fills a group up is not in the mask.
    kwargs.setdefault("mask", is_token)
    return from_groups(layer(x, **kwargs), (batch, tokens, dim))


def takes(layer, argument):
    """Whether the class of the layer takes this argument in a call."""
    return argument in inspect.signature(type(layer).call).parameters
