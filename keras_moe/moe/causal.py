"""Causal layers, in which no token may depend on later ones."""

import weakref

# What `_check` needs of the causal layers that have a router.
_LAYERS = weakref.WeakKeyDictionary()


def add_causal_layer(layer, router, capacity, route_per):
    """Notes a causal layer, and raises if it could not be causal.

    Args:
        layer: The layer.
        router: Its router.
        capacity: Its `keras_moe.layers.Capacity`.
        route_per: Its argument `route_per`.
    """
    _check(router, capacity, route_per, router.choices_per_token)
    layers = _LAYERS.setdefault(router, weakref.WeakKeyDictionary())
    layers[layer] = capacity, route_per


def check_causal_layers(router, choices):
    """Raises if a causal layer of the router could not stay causal.

    Args:
        router: The router.
        choices: int. The most choices a token is to have.
    """
    for capacity, route_per in _LAYERS.get(router, {}).values():
        _check(router, capacity, route_per, choices)


def _check(router, capacity, route_per, choices):
    if router.allow_lookahead:
        return
    # With several choices per token, first choices of later tokens come before
    # second choices of earlier tokens.
    one = choices == 1
    in_order = ("token", "position") if one else ("token",)
    looks_ahead = None
    if router.looks_ahead:
        looks_ahead = f"router={router!r}"
    elif capacity.drops and capacity.drop_policy not in in_order:
        looks_ahead = (
            f"a capacity with drop_policy={capacity.drop_policy!r}, a router "
            f"with choices_per_token={choices}"
        )
    elif route_per == "example":
        looks_ahead = f"route_per={route_per!r}"
    if looks_ahead is not None:
        raise ValueError(
            "In a causal layer what a token gets must not depend on later "
            "tokens, as it does where tokens compete for their experts: in "
            "training a model could read ahead, in generation it would be "
            "missing. Use another router, or the drop policy 'token', or give "
            "the router `allow_lookahead=True` where whole sequences are "
            f"scored. Received: causal=True, {looks_ahead}"
        )
