"""How `MoE` gets its parts from its arguments, and saves them."""

import keras

from keras_moe.dispatch.capacity import Capacity
from keras_moe.routers import TopKRouter


def default_name(prefix="moe"):
    """`"moe"`, `"moe_1"`, ...: Keras would make it `"mo_e"`."""
    number = keras.backend.get_uid(prefix) - 1
    return f"{prefix}_{number}" if number else prefix


def num_experts_of(num_experts, router, experts):
    """`num_experts`, or what a part handed in as an object says."""
    for part in (router, experts):
        if num_experts is None and not isinstance(part, (str, dict)):
            num_experts = getattr(part, "num_experts", None)
    if num_experts is None and (
        isinstance(router, str) or isinstance(experts, str)
    ):
        raise ValueError(
            "`num_experts` must be given if both `router` and `experts` are "
            f"names. Received: num_experts=None, router={router!r}, "
            f"experts={experts!r}"
        )
    return num_experts


def resolve_part(get, name, identifier, defaults, choices):
    """The router or the experts, from a name, a config or an object.

    Args:
        get: `routers.get` or `experts.get`.
        name: str. Name of the argument, for errors.
        identifier: What was given for it.
        defaults: dict. Arguments for a part made from a name.
        choices: dict. More of them, that the user may not give with an object.
    """
    given = {k: v for k, v in choices.items() if v is not None}
    if isinstance(identifier, str):
        return get(identifier, **defaults, **given)
    if given:
        raise ValueError(
            f"{', '.join(f'`{key}`' for key in given)} can only be given if "
            f"`{name}` is a name, not an object. Received: {given}, "
            f"{name}={identifier!r}"
        )
    part = get(identifier)
    if not isinstance(part, keras.layers.Layer):
        raise ValueError(
            f"`{name}` must be a name or a layer. Received: {name}={part!r}"
        )
    return part


def agreed_num_experts(num_experts, router, experts):
    """The number of experts, if all that say one say the same."""
    for name, part in (("router", router), ("experts", experts)):
        if getattr(part, "num_experts", None) is None:
            raise ValueError(
                f"`{name}` must have an attribute `num_experts`. "
                f"Received: {name}={part!r}"
            )
    numbers = {router.num_experts, experts.num_experts}
    if num_experts is not None:
        numbers.add(num_experts)
    if len(numbers) > 1:
        raise ValueError(
            "`num_experts`, `router` and `experts` must agree on the number "
            f"of experts. Received: num_experts={num_experts}, "
            f"router.num_experts={router.num_experts}, "
            f"experts.num_experts={experts.num_experts}"
        )
    return router.num_experts


def serialize_part(layer):
    """The config of a part, or `None`."""
    if layer is None:
        return None
    config = keras.saving.serialize_keras_object(layer)
    # Otherwise the part would be built on its own as it is loaded, and its
    # variables would lose the name of this layer from their paths.
    config.pop("build_config", None)
    return config


def check_intermediate_dim(intermediate_dim, experts):
    if isinstance(experts, str) and intermediate_dim is None:
        raise ValueError(
            "`intermediate_dim` must be given if `experts` is a name. "
            f"Received: intermediate_dim=None, experts={experts!r}"
        )


def check_layer(name, layer):
    """A layer, from itself or its config; `None` stays `None`."""
    if isinstance(layer, dict):
        layer = keras.saving.deserialize_keras_object(layer)
    if layer is not None and not isinstance(layer, keras.layers.Layer):
        raise ValueError(
            f"`{name}` must be a layer or None. Received: {name}={layer!r}"
        )
    return layer


def capacity_of(capacity, capacity_factor, eval_capacity_factor, drop_policy):
    """A `Capacity`, from itself, its config or the arguments in its place."""
    if capacity is None:
        return Capacity(
            capacity_factor,
            eval_capacity_factor,
            drop_policy="position" if drop_policy is None else drop_policy,
        )
    given = {
        "capacity_factor": capacity_factor,
        "eval_capacity_factor": eval_capacity_factor,
        "drop_policy": drop_policy,
    }
    given = {k: v for k, v in given.items() if v is not None}
    if given:
        raise ValueError(
            "`capacity` stands in the place of "
            f"{', '.join(f'`{key}`' for key in given)}. Received both: {given}"
        )
    if isinstance(capacity, dict):
        capacity = keras.saving.deserialize_keras_object(capacity)
    if not isinstance(capacity, Capacity):
        raise ValueError(
            "`capacity` must be a keras_moe.layers.Capacity or None. "
            f"Received: capacity={capacity!r}"
        )
    return capacity


def check_kept_weights(capacity, router):
    """Of one choice the survivor's share is always one."""
    one = isinstance(router, TopKRouter) and router.choices_per_token == 1
    if capacity.normalize_kept_weights and one:
        raise ValueError(
            "With one expert a token, `normalize_kept_weights` makes its "
            "weight always one, and the router would get no gradient. "
            f"Received: router={router!r} with top_k=1"
        )


def check_causal(causal, router, capacity, route_per):
    if not causal or getattr(router, "allow_lookahead", False):
        return
    # Where a token has more choices, its later ones stand behind the first
    # choices of later tokens.
    one = isinstance(router, TopKRouter) and router.choices_per_token == 1
    in_order = ("token", "position") if one else ("token",)
    looks_ahead = None
    if getattr(router, "looks_ahead", False):
        looks_ahead = f"router={router!r}"
    elif capacity.drops and capacity.drop_policy not in in_order:
        looks_ahead = f"a capacity with drop_policy={capacity.drop_policy!r}"
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
