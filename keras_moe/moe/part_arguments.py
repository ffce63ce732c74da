"""Makes the parts of a layer from its arguments, and saves them."""

import keras

from keras_moe import experts as experts_lib
from keras_moe import routers as routers_lib
from keras_moe.dispatch import Capacity
from keras_moe.dispatch import Dispatcher
from keras_moe.experts.named_experts import arguments_of

# Arguments that are passed on to `keras.layers.Layer`.
_LAYER_ARGUMENTS = ("activity_regularizer", "dtype", "trainable")


def default_name(prefix="moe"):
    """`"moe"`, `"moe_1"`, ...: Keras would make it `"mo_e"`."""
    number = keras.backend.get_uid(prefix) - 1
    return f"{prefix}_{number}" if number else prefix


def router_and_experts(
    router, experts, num_experts, dtype, of_router, of_experts, get_router=None
):
    """`(router, experts)`, each from a name, a config or an object.

    Args:
        router, experts, num_experts: Arguments of the layer.
        dtype: The layer's dtype policy, for parts made from names, or `None`.
        of_router, of_experts: dicts of arguments for parts made from names.
        get_router: Used instead of `routers.get`. Defaults to `None`.

    Raises:
        ValueError: If a part cannot be made, or they do not agree on the number
            of experts.
    """
    num_experts = num_experts_of(num_experts, router, experts)
    check_intermediate_dim(of_experts["intermediate_dim"], experts)
    defaults = {"num_experts": num_experts, "dtype": dtype}
    router = resolve_part(
        get_router or routers_lib.get,
        "router",
        router,
        {**defaults, "name": "router"},
        of_router,
    )
    experts = resolve_part(
        experts_lib.get,
        "experts",
        experts,
        {**defaults, "name": "experts"},
        of_experts,
    )
    check_agreement(num_experts, router, experts)
    return router, experts


def num_experts_of(num_experts, router, experts):
    """`num_experts`, or the number of a part given as an object."""
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
        identifier: Value of the argument.
        defaults: dict. Arguments for a part made from a name.
        choices: dict. More arguments, which are an error beside an object.
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


def check_agreement(num_experts, router, experts):
    """Raises unless all have the same number of experts."""
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


def serialize_part(layer):
    """The config of a part, or `None`."""
    if layer is None:
        return None
    # While it saves a model, Keras marks an object that it meets again, so that
    # it is one object after loading. The first mention needs the mark too, and
    # the others may be anywhere in the model.
    keras.saving.serialize_keras_object(layer)
    config = keras.saving.serialize_keras_object(layer)
    # Otherwise loading would build the part on its own, and the paths of its
    # variables would lack the name of this layer.
    config.pop("build_config", None)
    return config


def check_intermediate_dim(intermediate_dim, experts):
    if isinstance(experts, str) and intermediate_dim is None:
        raise ValueError(
            "`intermediate_dim` must be given if `experts` is a name. "
            f"Received: intermediate_dim=None, experts={experts!r}"
        )


def split_arguments(layer_name, kwargs, experts):
    """`(arguments of the experts, arguments of keras.layers.Layer)`.

    Args:
        layer_name: str. Name of the layer's class, for errors.
        kwargs: dict. Arguments that the layer does not have itself.
        experts: A name, or experts.

    Raises:
        ValueError: If an argument belongs to neither.
    """
    layer = {k: v for k, v in kwargs.items() if k in _LAYER_ARGUMENTS}
    rest = {k: v for k, v in kwargs.items() if k not in layer}
    if not isinstance(experts, str):
        if rest:
            raise ValueError(
                f"{layer_name} hands the arguments of experts on only if "
                "`experts` is a name. Give them to the experts themselves. "
                f"Received: {rest}, experts={experts!r}"
            )
        return {}, layer
    known = arguments_of(experts) - {"num_experts", "name"}
    wrong = sorted(set(rest) - known)
    if wrong:
        raise ValueError(
            f"{layer_name} does not know {', '.join(f'`{k}`' for k in wrong)}. "
            f"Besides its own it takes the arguments of experts={experts!r}: "
            f"{sorted(known - set(_LAYER_ARGUMENTS))}. "
            f"Received: { {k: rest[k] for k in wrong} }"
        )
    return rest, layer


def as_layer(name, layer):
    """A layer, from itself or its config; `None` stays `None`."""
    if isinstance(layer, dict):
        layer = keras.saving.deserialize_keras_object(layer)
    if layer is not None and not isinstance(layer, keras.layers.Layer):
        raise ValueError(
            f"`{name}` must be a layer or None. Received: {name}={layer!r}"
        )
    return layer


def as_dispatcher(
    dispatcher,
    capacity,
    capacity_factor,
    eval_capacity_factor,
    drop_policy,
    weights_on,
    causal,
):
    """A `Dispatcher`, from itself, its config or the flat arguments."""
    flat = {
        "capacity_factor": capacity_factor,
        "eval_capacity_factor": eval_capacity_factor,
        "drop_policy": drop_policy,
    }
    if dispatcher is None:
        if capacity is None:
            capacity = Capacity(**_given(flat))
        else:
            _refuse_beside("capacity", flat)
        dispatcher = Dispatcher(capacity, weights_on or "output")
        # A config says what happens in inference; an earlier version's dropped.
        if causal and not isinstance(capacity, dict):
            dispatcher.capacity = dispatcher.capacity.dropless_in_inference()
        return dispatcher
    _refuse_beside(
        "dispatcher", {**flat, "capacity": capacity, "weights_on": weights_on}
    )
    if isinstance(dispatcher, dict):
        dispatcher = keras.saving.deserialize_keras_object(dispatcher)
    if not isinstance(dispatcher, Dispatcher):
        raise ValueError(
            "`dispatcher` must be a keras_moe.dispatch.Dispatcher or None. "
            f"Received: dispatcher={dispatcher!r}"
        )
    capacity = dispatcher.capacity
    if causal and capacity.drops and capacity.eval_capacity_factor is None:
        raise ValueError(
            "In a causal layer the `dispatcher` must say what its capacity is "
            "in inference: `eval_capacity_factor=math.inf` drops nothing, "
            "with any other an output depends on the rest of the batch. "
            "Received: causal=True, dispatcher.capacity with "
            "eval_capacity_factor=None"
        )
    return dispatcher


def _given(arguments):
    return {k: v for k, v in arguments.items() if v is not None}


def _refuse_beside(name, arguments):
    given = _given(arguments)
    if given:
        raise ValueError(
            f"`{name}` stands in the place of "
            f"{', '.join(f'`{key}`' for key in given)}. Received both: {given}"
        )


def check_kept_weights(capacity, router):
    """Raises if normalizing would make every kept weight one."""
    if capacity.normalize_kept_weights and router.max_choices(None) == 1:
        raise ValueError(
            "With one expert a token, `normalize_kept_weights` makes its "
            "weight always one, and the router would get no gradient. "
            f"Received: router={router!r} with top_k=1"
        )
