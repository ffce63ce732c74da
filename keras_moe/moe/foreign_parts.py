"""Gives parts of foreign classes the declarations of our base classes.

A router or a bank of experts may be any Keras layer, a loss any function. A
layer adapts each part once; after that, all parts have the same interface.
"""

import types

import keras

from keras_moe.experts import Experts
from keras_moe.losses import RoutingLoss
from keras_moe.routers import Router

_ROUTER_DECLARATIONS = (
    *("uses_context", "needs_context", "looks_ahead", "allow_lookahead"),
    "distinct_choices",
    *("choices_per_token", "per", "routing_class", "max_rows", "max_choices"),
)
_EXPERTS_DECLARATIONS = ("uses_max_group_size", "mix", "engine")


def as_router(layer):
    """The router, with all declarations of `Router`."""
    return _declaring(layer, Router, _ROUTER_DECLARATIONS)


def as_experts(layer, routed=False):
    """The experts, with all declarations of `Experts`.

    Args:
        layer: A layer of experts.
        routed: bool. Whether a router chooses among them.
    """
    layer = _declaring(layer, Experts, _EXPERTS_DECLARATIONS)
    layer.routed = routed
    return layer


def _declaring(layer, base, names):
    if not isinstance(layer, base):
        for name in names:
            if not hasattr(layer, name):
                default = getattr(base, name)
                if isinstance(default, types.FunctionType):
                    default = types.MethodType(default, layer)
                setattr(layer, name, default)
    return layer


def output_shape_of(layer, shape):
    """Output shape of a part; by default, experts keep the shape."""
    if layer is None:
        return tuple(shape)
    is_silent = (
        type(layer).compute_output_shape
        is keras.layers.Layer.compute_output_shape
    )
    if is_silent and hasattr(layer, "num_experts"):
        return tuple(shape)
    return tuple(layer.compute_output_shape(shape))


def check_width(experts, rows_shape, returned_shape):
    """Raises unless the returned rows have the width of the output shape."""
    width = output_shape_of(experts, rows_shape)[-1]
    if returned_shape[-1] != width:
        raise ValueError(
            "`experts` must return rows of the width that their "
            "`compute_output_shape` says, or keep it if they have none. "
            f"Received rows of width {returned_shape[-1]}, expected {width}"
        )


def check_routing(routing, num_tokens, router):
    """Raises unless the routing is of all tokens, as far as that is known."""
    shapes = [
        tuple(x.shape) for x in (routing.expert_indices, routing.expert_weights)
    ]
    # Symbolic sizes are not ints.
    known = [
        size
        for size in (num_tokens, shapes[0][0], shapes[1][0])
        if isinstance(size, int)
    ]
    if any(size != known[0] for size in known) or (
        shapes[0][-1] != shapes[1][-1]
    ):
        raise ValueError(
            "`router` must return `expert_indices` and `expert_weights` of the "
            f"shape (T, K) for T tokens. Received: T={num_tokens}, "
            f"expert_indices.shape={shapes[0]}, "
            f"expert_weights.shape={shapes[1]}, router={router!r}"
        )


class FunctionLoss(RoutingLoss):
    """A function `(routing, mask) -> scalar`, called like any other loss."""

    def __init__(self, function):
        super().__init__(1.0)
        self.function = function

    def __call__(self, routing, mask=None, num_sequences=1, context=None):
        return self.function(routing, mask)


def as_loss(loss):
    return loss if isinstance(loss, RoutingLoss) else FunctionLoss(loss)


def serialize_loss(loss):
    if isinstance(loss, FunctionLoss):
        loss = loss.function
    return keras.saving.serialize_keras_object(loss)
