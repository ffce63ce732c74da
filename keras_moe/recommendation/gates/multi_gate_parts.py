"""Arguments, parts and config of a `MultiGateMoE`."""

import keras

from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.checks import check_int_up_to
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.checks import is_int
from keras_moe.ops import activations
from keras_moe.recommendation.gates import gate_activations
from keras_moe.recommendation.gates import layer_networks
from keras_moe.recommendation.gates.feature_gates import FeatureGates
from keras_moe.recommendation.gates.self_residual import ResidualWeights
from keras_moe.recommendation.gates.task_gates import TaskGates
from keras_moe.stacked.draws import own_draws
from keras_moe.stacked.draws import own_seed
from keras_moe.stacked.stacked_dense import NORMALIZATIONS
from keras_moe.stacked.stacked_dense import PLACES
from keras_moe.stacked.stacked_mlp import StackedMLP

# Arguments that describe the experts, and what stands for not being given.
EXPERT_DEFAULTS = {
    "expert_units": (16,),
    "expert_activation": keras.activations.relu,
    "expert_use_bias": True,
    "expert_normalization": None,
    "expert_normalization_place": "before_activation",
    "expert_dropout": 0.0,
    "kernel_regularizer": None,
}
PLAIN = (
    *("num_tasks", "expert_units", "num_shared_experts", "num_task_experts"),
    *("visibility", "shared_sees", "output_shared", "expert_slots"),
    *("expert_use_bias", "expert_normalization", "expert_dropout"),
    *("expert_normalization_place", "feature_gate_rank", "gate_input"),
    *("gate_units", "gate_use_bias", "gate_normalization", "gate_top_k"),
    *("gate_gamma", "gate_entropy_weight", "gate_unused_code_weight"),
    *("gate_temperature", "gate_dropout", "self_residual"),
    *("stop_cross_task_gradients", "normalization_epsilon"),
    *("return_gates", "seed"),
)


def check_arguments(layer):
    check_one_of(
        "expert_normalization", layer.expert_normalization, NORMALIZATIONS
    )
    check_one_of(
        "expert_normalization_place", layer.expert_normalization_place, PLACES
    )
    check_rate("expert_dropout", layer.expert_dropout)
    if layer.feature_gate_rank is not None:
        check_int("feature_gate_rank", layer.feature_gate_rank, 1)
    check_one_of("gate_input", layer.gate_input, ("slot", "slot_plus_shared"))
    check_one_of(
        "gate_normalization", layer.gate_normalization, (None, "batch")
    )
    if layer.gate_activation in ("top_k", "dselect_k"):
        seen = int(layer.units.visible.sum(axis=-1).min())
        check_int_up_to(
            "gate_top_k", layer.gate_top_k, "experts that each gate sees", seen
        )
    if layer.gate_activation == "dselect_k":
        _check_default(
            layer, "gate_normalization", None, "gate_activation='dselect_k'"
        )
        _check_default(
            layer, "gate_temperature", 1.0, "gate_activation='dselect_k'"
        )
    if layer.stop_cross_task_gradients and layer.visibility == "own_and_shared":
        raise ValueError(
            "With `stop_cross_task_gradients`, tasks must see experts of other "
            "tasks. Received: stop_cross_task_gradients=True, "
            f"visibility={layer.visibility!r}"
        )
    check_positive("gate_gamma", layer.gate_gamma)
    check_at_least("gate_entropy_weight", layer.gate_entropy_weight, 0)
    check_at_least("gate_unused_code_weight", layer.gate_unused_code_weight, 0)
    check_positive("gate_temperature", layer.gate_temperature)
    check_rate("gate_dropout", layer.gate_dropout)
    check_one_of(
        "self_residual", layer.self_residual, (None, "weights", "gates")
    )
    check_positive("normalization_epsilon", layer.normalization_epsilon)
    slots = layer.expert_slots
    if slots is not None and (
        not isinstance(slots, (list, tuple))
        or len(slots) != layer.num_experts
        or not all(is_int(slot) and slot >= 0 for slot in slots)
    ):
        raise ValueError(
            f"`expert_slots` must be a list of {layer.num_experts} ints of at "
            f"least 0, one for each expert. Received: expert_slots={slots!r}"
        )


def _check_default(layer, name, default, without):
    value = getattr(layer, name)
    if value != default:
        raise ValueError(
            f"`{name}` means nothing with {without}. Received: {name}={value!r}"
        )


def make_experts(layer, experts):
    """The experts, or `None` if they are their input as it is."""
    if experts is not None:
        layer_networks.check_experts(experts, layer.num_experts)
        for name, default in EXPERT_DEFAULTS.items():
            _check_default(layer, name, default, "`experts`")
        return layer_networks.LayerNetworks(
            experts, layer.num_experts, dtype=layer.dtype_policy, name="experts"
        )
    if not layer.expert_units:
        for name, default in EXPERT_DEFAULTS.items():
            if name != "expert_units":
                _check_default(layer, name, default, "expert_units=()")
        return None
    return StackedMLP(
        layer.num_experts,
        layer.expert_units,
        activation=layer.expert_activation,
        use_bias=layer.expert_use_bias,
        normalization=layer.expert_normalization,
        normalization_epsilon=layer.normalization_epsilon,
        normalization_place=layer.expert_normalization_place,
        dropout=layer.expert_dropout,
        seed=own_seed(layer.seed, 0),
        kernel_initializer=own_draws(layer.kernel_initializer, 0),
        kernel_regularizer=layer.kernel_regularizer,
        dtype=layer.dtype_policy,
        name="experts",
    )


def make_feature_gates(layer, slots):
    if layer.feature_gate_rank is None:
        return None
    return FeatureGates(
        slots,
        layer.feature_gate_rank,
        own_draws(layer.kernel_initializer, 1),
        dtype=layer.dtype_policy,
        name="feature_gates",
    )


def make_gates(layer):
    return TaskGates(
        layer.units.visible,
        units=layer.gate_units,
        use_bias=layer.gate_use_bias,
        normalization=layer.gate_normalization,
        normalization_epsilon=layer.normalization_epsilon,
        activation=layer.gate_activation,
        top_k=layer.gate_top_k,
        gamma=layer.gate_gamma,
        entropy_weight=layer.gate_entropy_weight,
        unused_code_weight=layer.gate_unused_code_weight,
        temperature=layer.gate_temperature,
        dropout=layer.gate_dropout,
        seed=own_seed(layer.seed, 1),
        kernel_initializer=own_draws(layer.gate_initializer, 0),
        kernel_regularizer=layer.gate_regularizer,
        dtype=layer.dtype_policy,
        name="gates",
    )


def make_residual(layer):
    """`None`, a `ResidualWeights` or `TaskGates` of each unit's own experts."""
    own = layer.units.own
    if layer.self_residual is None or not own.any():
        return None
    if layer.self_residual == "weights":
        return ResidualWeights(
            own,
            is_learned=layer.units.has_several_somewhere,
            seed=own_seed(layer.seed, 2),
            dtype=layer.task_gates.dtype_policy,
            name="residual",
        )
    return TaskGates(
        own,
        use_bias=layer.gate_use_bias,
        activation="self_gate",
        kernel_initializer=own_draws(layer.gate_initializer, 1),
        kernel_regularizer=layer.gate_regularizer,
        dtype=layer.dtype_policy,
        name="residual",
    )


def config_of(layer):
    """The arguments of a layer, but `experts`."""
    config = {name: getattr(layer, name) for name in PLAIN}
    for name in ("kernel_initializer", "gate_initializer"):
        config[name] = keras.initializers.serialize(getattr(layer, name))
    for name in ("kernel_regularizer", "gate_regularizer"):
        config[name] = keras.regularizers.serialize(getattr(layer, name))
    config["expert_activation"] = activations.serialize(layer.expert_activation)
    config["gate_activation"] = gate_activations.serialize(
        layer.gate_activation
    )
    return config
