"""A layer of experts made of a dense feed-forward network."""

import warnings

import keras
import numpy as np
from keras import ops

from keras_moe.conversion.recycled_weights import Recipe
from keras_moe.conversion.recycled_weights import expert_weights
from keras_moe.conversion.sublayers import name_scope_of
from keras_moe.dispatch.dispatcher import Dispatcher
from keras_moe.experts.glu_experts import GLUExperts
from keras_moe.experts.mlp_experts import MLPExperts
from keras_moe.moe.moe import MoE
from keras_moe.moe.part_arguments import serialize_part


def moe_from(place, num_experts, options, recipe, rng, check):
    """A built `MoE` whose experts are made of a dense network.

    Args:
        place: A `FeedForward`.
        num_experts: int.
        options: dict of further arguments of `MoE`.
        recipe, rng: As for `expert_weights`.
        check: bool. Whether to warn if plain copies give something else.
    """
    weights = place.weights()
    width = weights["down_kernel"].shape[0]
    policy = place.up.dtype_policy
    arguments = {
        "num_experts": num_experts,
        "intermediate_dim": recipe.intermediate_dim or width,
        "activation": place.activation,
        "use_bias": "up_bias" in weights,
        "output_dim": None
        if place.input_dim == place.output_dim
        else place.output_dim,
        "dropout": place.dropout,
        "dtype": policy,
        "name": "experts",
        **_regularizers(place),
    }
    bank = MLPExperts if place.gate is None else GLUExperts
    kwargs = {name: _own(part) for name, part in options.items()}
    if place.output_dropout and kwargs.get("post_experts") is None:
        kwargs["post_experts"] = keras.layers.Dropout(
            place.output_dropout, dtype=policy
        )
    if not isinstance(kwargs["router"], str):
        kwargs.pop("top_k")
    moe = MoE(
        experts=bank(**arguments),
        dtype=policy,
        name="moe" if place.owner is not None else f"{place.up.name}_moe",
        **kwargs,
    )
    if moe.router.needs_context:
        raise ValueError(
            "`router` must decide by the tokens alone. "
            f"Received: router={moe.router!r}"
        )
    with name_scope_of(place.owner):
        moe.build((None, None, place.input_dim))
    compares = check and recipe.intermediate_dim is None
    if compares:
        copies = expert_weights(
            weights, num_experts, Recipe(None, recipe.sampling, 0, 0), rng
        )
        _assign(moe, copies)
        _warn_if_different(moe, place)
    if not (compares and recipe.gives_copies()):
        _assign(moe, expert_weights(weights, num_experts, recipe, rng))
    moe.trainable = place.up.trainable
    return moe


def _own(part):
    """A layer, or a dispatcher, of its own for each block."""
    if isinstance(part, keras.layers.Layer):
        return keras.saving.deserialize_keras_object(serialize_part(part))
    if isinstance(part, Dispatcher):
        return keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(part)
        )
    return part


def _regularizers(place):
    """The regularizers and constraints that both layers share."""
    found = {}
    for name in (
        *("kernel_regularizer", "bias_regularizer"),
        *("kernel_constraint", "bias_constraint"),
    ):
        up, down = getattr(place.up, name), getattr(place.down, name)
        kind = name.rpartition("_")[2]
        module = getattr(keras, f"{kind}s")
        if module.serialize(up) != module.serialize(down):
            raise ValueError(
                f"The layers of {place.name} have different `{name}`, which "
                "experts cannot have. Take them off first. Received: "
                f"{up!r} and {down!r}"
            )
        found[name] = up
    return found


def _assign(moe, weights):
    for name, value in weights.items():
        getattr(moe.experts, name).assign(value)


def _warn_if_different(moe, place):
    x = np.random.default_rng(0).normal(size=(16, place.input_dim))
    x = x.astype("float32")
    wanted = place.compute(x)
    given = ops.convert_to_numpy(
        ops.cast(moe(ops.convert_to_tensor(x[None])), "float32")
    )[0]
    exact = keras.backend.standardize_dtype(moe.compute_dtype) == "float32"
    tolerance = (1e-4 if exact else 5e-2) * np.abs(wanted).max()
    if np.abs(given - wanted).max() > tolerance:
        warnings.warn(
            "With these arguments the experts do not give what the dense "
            "network gives: the weights of a token do not sum to one, choices "
            "are dropped, or something is added. Received: "
            f"router={moe.router!r}, capacity={moe.capacity!r}",
            stacklevel=4,
        )
