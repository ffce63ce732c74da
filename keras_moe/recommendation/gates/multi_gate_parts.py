"""The parts of a `MultiGateMoE`, from objects or from flat arguments."""

import contextlib

import keras

from keras_moe.checks import as_units
from keras_moe.checks import check_int
from keras_moe.recommendation.gates.feature_gates import FeatureGates
from keras_moe.recommendation.gates.layer_networks import LayerNetworks
from keras_moe.recommendation.gates.task_gates import TaskGates
from keras_moe.stacked.draws import own_draws
from keras_moe.stacked.draws import own_seed
from keras_moe.stacked.stacked_mlp import StackedMLP

# From the name of a flat argument to the argument of the part.
OF_EXPERTS = {
    "expert_units": "units",
    "expert_activation": "activation",
    "expert_use_bias": "use_bias",
    "expert_normalization": "normalization",
    "expert_normalization_place": "normalization_place",
    "expert_dropout": "dropout",
    "kernel_regularizer": "kernel_regularizer",
}
OF_GATES = {
    "gate_units": "units",
    "gate_use_bias": "use_bias",
    "gate_normalization": "normalization",
    "gate_activation": "activation",
    "gate_top_k": "top_k",
    "gate_gamma": "gamma",
    "gate_entropy_weight": "entropy_weight",
    "gate_unused_code_weight": "unused_code_weight",
    "gate_temperature": "temperature",
    "gate_dropout": "dropout",
    "gate_initializer": "kernel_initializer",
    "gate_regularizer": "kernel_regularizer",
}
SHORTHANDS = {*OF_EXPERTS, *OF_GATES, "normalization_epsilon"}
# Configs of older versions contain all flat arguments. With these values, the
# defaults, they may stand beside `experts`.
_DEFAULTS = {
    "expert_units": (16,),
    "expert_activation": "relu",
    "expert_use_bias": True,
    "expert_normalization": None,
    "expert_normalization_place": "before_activation",
    "expert_dropout": 0.0,
    "kernel_regularizer": None,
}


def split(kwargs):
    """`(flat arguments, other arguments)`."""
    flat = {key: kwargs[key] for key in kwargs if key in SHORTHANDS}
    return flat, {key: kwargs[key] for key in kwargs if key not in flat}


def feature_gates_of(rank, slots, kernel_initializer, dtype):
    """The gates on the experts' inputs, or `None` without a rank."""
    if rank is None:
        return None
    check_int("feature_gate_rank", rank, 1)
    return FeatureGates(
        slots,
        rank,
        own_draws(kernel_initializer, 1),
        dtype=dtype,
        name="feature_gates",
    )


def experts_of(experts, flat, num_experts, kernel_initializer, seed, dtype):
    """The layer of all experts, given or made from flat arguments.

    Args:
        experts, kernel_initializer, seed: As for `MultiGateMoE`.
        flat: Dict of flat arguments, `expert_units` among them.
        num_experts: int.
        dtype: dtype policy of a new layer.

    Returns:
        A layer `(B, D)` or `(B, S, D)` -> `(B, E, O)`; `None` for experts that
        return their input unchanged.
    """
    units = as_units("expert_units", flat["expert_units"], minimum=0)
    flat = {**flat, "expert_units": units}
    if experts is not None:
        _check_unused(flat, OF_EXPERTS, "`experts`")
        return _networks(experts, num_experts, dtype)
    if not units:
        del flat["expert_units"]
        _check_unused(flat, OF_EXPERTS, "expert_units=()")
        return None
    with _errors_name(OF_EXPERTS):
        return StackedMLP(
            num_experts,
            **_arguments(flat, OF_EXPERTS),
            kernel_initializer=own_draws(kernel_initializer, 0),
            seed=own_seed(seed, 0),
            dtype=dtype,
            name="experts",
        )


def _networks(experts, num_experts, dtype):
    number = getattr(experts, "num_networks", None)
    if number is None or not isinstance(experts, keras.layers.Layer):
        with _errors_name({"experts": "layer"}):
            return LayerNetworks(
                experts, num_experts, dtype=dtype, name="experts"
            )
    if number != num_experts:
        raise ValueError(
            f"`experts` must be {num_experts} networks: the experts of each "
            "task, then the shared ones. Received: "
            f"experts={experts!r} with num_networks={number}"
        )
    return experts


def gates_of(gates, flat, visible, seed, dtype):
    """`TaskGates` with `visible` set, given or made from flat arguments.

    Args:
        gates, seed: As for `MultiGateMoE`.
        flat: Dict of flat arguments.
        visible: `(G, E)` boolean array.
        dtype: dtype policy of a new layer.
    """
    if gates is None:
        with _errors_name(OF_GATES):
            gates = TaskGates(
                **_arguments(flat, OF_GATES),
                seed=own_seed(seed, 1),
                dtype=dtype,
                name="gates",
            )
            gates.set_visible(visible)
        return gates
    if not isinstance(gates, TaskGates):
        raise ValueError(
            "`gates` must be a keras_moe.layers.TaskGates or None. "
            f"Received: gates={gates!r}"
        )
    _check_unused(flat, OF_GATES, "`gates`")
    gates.set_visible(visible)
    return gates


def _check_unused(flat, names, with_what):
    """Raises if one of the arguments differs from its default."""
    for name in flat:
        if name not in names:
            continue
        value = getattr(flat[name], "__name__", flat[name])
        if name not in _DEFAULTS or value != _DEFAULTS[name]:
            raise ValueError(
                f"`{name}` means nothing with {with_what}. "
                f"Received: {name}={flat[name]!r}"
            )


@contextlib.contextmanager
def _errors_name(shorthands):
    """Renames the arguments in errors of a part to the flat arguments."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        for flat, name in shorthands.items():
            message = message.replace(f"`{name}`", f"`{flat}`")
            message = message.replace(f" {name}=", f" {flat}=")
        raise ValueError(message) from error


def _arguments(flat, shorthands):
    arguments = {
        name: flat[given] for given, name in shorthands.items() if given in flat
    }
    if "normalization_epsilon" in flat:
        arguments["normalization_epsilon"] = flat["normalization_epsilon"]
    return arguments
