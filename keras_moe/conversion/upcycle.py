import re
import warnings

import keras
import numpy as np
from keras import ops

from keras_moe.checks import as_ints
from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.checks import check_number
from keras_moe.checks import check_one_of
from keras_moe.checks import check_seed
from keras_moe.checks import is_int
from keras_moe.conversion import graphs
from keras_moe.conversion.feed_forwards import FeedForward
from keras_moe.conversion.feed_forwards import held_feed_forwards
from keras_moe.conversion.recycled_weights import Recipe
from keras_moe.conversion.recycled_weights import expert_weights
from keras_moe.conversion.sublayers import attributes_of
from keras_moe.conversion.sublayers import classes_of
from keras_moe.conversion.sublayers import name_scope_of
from keras_moe.conversion.sublayers import with_sublayers
from keras_moe.conversion.upcycled import data_format_of
from keras_moe.conversion.upcycled import put_experts
from keras_moe.experts.glu_experts import GLUExperts
from keras_moe.experts.mlp_experts import MLPExperts
from keras_moe.moe.moe import MoE
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.vision.layers.encoder_block import EncoderBlock


def upcycle(
    model,
    num_experts,
    layers="last_2",
    top_k=None,
    router="top_k",
    noise=0.0,
    reinit=0.0,
    intermediate_dim=None,
    sampling="importance",
    seed=None,
    **kwargs,
):
    """A trained dense model with experts in the place of feed-forwards.

    ```
    experts[e] = (W_in, b_in, W_out, b_out)     copies of the dense network,
                                                or `noise`, `reinit`,
                                                `intermediate_dim`
    y          = sum over k of expert_weights[k] * experts[indices[k]](x)
    ```

    With plain copies, and weights of a token that sum to one, the new model
    gives what the dense one gives. Copies that are all the same part in
    training, as the router, which begins at random, sends them different
    tokens; the other arguments make them differ from the start.

    What counts as a feed-forward network, and in which models:

    - Models of `keras_moe.models`: the dense blocks.
    - Functional and sequential models: `Dense`, perhaps an activation, perhaps
      `Dropout`, `Dense`, one after the other with no branch, from a width back
      to the same. (Where there is no such pair: others whose end is not an
      output of the model.)
    - keras-hub's ViT, DeiT, DINOv2, DINOv3, SigLIP and CLIP encoders,
      `TransformerEncoder`, and image classifiers on them. A pooling head's
      feed-forward is left as it is.
    - Any other layer in one of these, or model, that holds a layer of two
      `Dense`, or three of a gated unit, and nothing else with weights. That it
      computes just that is tried out on random tokens.

    The new model has weights of its own. All that is not replaced keeps its
    weights, and whether they are frozen; of what is replaced, no weight is left
    behind. The optimizer is not carried over: compile the new model. A
    functional model stays one. Models and layers that are made from arguments
    of their own become a subclass of their class, `UpcycledViTBackbone` for
    example, whose configuration has the experts; they are saved and loaded
    like the others, also in a process that has upcycled nothing
    (`keras_moe.conversion.upcycled_class`).

    Args:
        model: A built `keras.Model`. It stays as it is.
        num_experts: int, or a list with one for each block that is replaced.
        layers: Which feed-forwards: `"last_n"` the last n that are dense,
            `"every_2"` the second, the fourth, ..., `"all"`, or a list of
            numbers from 0. Blocks that have experts already count in these
            numbers, and stay. Defaults to `"last_2"`.
        top_k: int. Experts per token, for a router given by name. Defaults to
            `None`, what the router has by default, 2 for `"top_k"`.
        router: A name of `keras_moe.routers.get`, or a router, of which each
            block gets its own. Only routers whose weights sum to one for each
            token keep the outputs; others, such as `"v_moe"` and `"switch"`,
            scale what the experts add to a token, and a warning says so.
            Defaults to `"top_k"`.
        noise: float. Standard deviation of noise on the experts' kernels,
            relative to that of the kernel. Defaults to `0.0`.
        reinit: float from 0 to 1. Share of the hidden units of each expert,
            others for each, whose weights are drawn anew from a normal
            distribution with the mean and deviation of those that they replace
            (Drop-Upcycling). Defaults to `0.0`.
        intermediate_dim: int, or `None`. The width of narrower experts, each
            with hidden units drawn from the dense network (checkpoint
            recycling); the last kernel is scaled up by the ratio of the widths.
            Defaults to `None`, the whole width.
        sampling: How they are drawn: `"importance"` with probabilities in
            proportion to the product of the norms of a unit's weights, or
            `"uniform"`. Defaults to `"importance"`.
        seed: int, or `None`. Seed of what is drawn for the experts; the routers
            are drawn as Keras draws them. Defaults to `None`.
        **kwargs: Further arguments of `keras_moe.layers.MoE`: `losses`,
            `capacity_factor`, `drop_policy`, `shared_experts`, ...

    Returns:
        A new model that is not compiled.

    Raises:
        ValueError: If nothing to replace is found (the message lists what was
            looked at), or arguments are out of range.

    Example:

    >>> dense = keras_moe.models.VMoEBackbone(
    ...     image_shape=(16, 16, 3), patch_size=8, num_layers=4, num_heads=2,
    ...     hidden_dim=8, mlp_dim=16, moe_layers=[],
    ... )
    >>> model = keras_moe.conversion.upcycle(dense, num_experts=4)
    >>> model.moe_blocks
    [2, 3]

    Reference:

    - [Komatsuzaki et al., 2022](https://arxiv.org/abs/2212.05055)
    - [Nakamura et al., 2025](https://arxiv.org/abs/2502.19261), section 3
      (`reinit`)
    - [Zhu et al., 2024](https://arxiv.org/abs/2406.04801), section 3.1
      (`intermediate_dim`)
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"`model` must be a keras.Model that is built. Received: {model!r}"
        )
    check_at_least("noise", noise, 0)
    check_number("reinit", reinit)
    if not 0 <= reinit <= 1:
        raise ValueError(
            f"`reinit` must be between 0 and 1. Received: reinit={reinit}"
        )
    if intermediate_dim is not None:
        check_int("intermediate_dim", intermediate_dim, 1)
    check_one_of("sampling", sampling, ("importance", "uniform"))
    check_seed("seed", seed)
    own = ("experts", "activation", "return_routing", "route_per", "causal")
    wrong = [name for name in own if name in kwargs]
    if wrong:
        raise ValueError(
            "`upcycle` takes arguments of MoE, but for "
            f"{', '.join(own)}. Received: {wrong}"
        )
    found, looked_at = _found(model)
    chosen = _chosen(model, layers, found, looked_at)
    numbers = as_ints("num_experts", num_experts, len(chosen), 1)
    for i in chosen:
        if (intermediate_dim or 0) > found[i].weights()["down_kernel"].shape[0]:
            raise ValueError(
                "`intermediate_dim` must be at most the width of the dense "
                f"network. Received: intermediate_dim={intermediate_dim}, "
                f"{found[i].name}"
            )
    recipe = Recipe(intermediate_dim, sampling, reinit, noise)
    options = {"router": router, "top_k": top_k, **kwargs}
    rng = np.random.default_rng(seed)
    experts = {
        i: _moe(found[i], number, options, recipe, rng, check=i == chosen[0])
        for i, number in zip(chosen, numbers, strict=True)
    }
    with keras.saving.custom_object_scope(classes_of(model)):
        return _with_experts(model, experts)


def _found(layer):
    """`(feed-forwards in order, lines about what else was looked at)`."""
    inner = _backbone(layer)
    if inner is not None:
        return _found(inner)
    if not graphs.is_graph(layer):
        return held_feed_forwards(layer)
    pairs, looked_at = graphs.pairs_of(layer)
    found = []
    for part in layer.layers:
        if part.name in pairs:
            found.append(pairs[part.name])
            continue
        held, seen = _found(part)
        found += held
        if part.weights and type(part) is not keras.layers.Dense:
            looked_at += seen
    return found, looked_at


def _backbone(model):
    """The backbone that a model is made from, or `None`."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, keras.Model) or graphs.is_graph(model):
        return None
    return backbone if "backbone" in model.get_config() else None


def _chosen(model, layers, found, looked_at):
    """The numbers of the feed-forwards to replace."""
    dense = [i for i, f in enumerate(found) if isinstance(f, FeedForward)]
    if not dense:
        taken = [f"{f.name}: has experts" for f in found]
        raise ValueError(
            f"`model` must have dense feed-forward networks. In {model.name!r} "
            "none was found among: " + "; ".join(taken + looked_at)
        )
    if isinstance(layers, str):
        last = re.fullmatch(r"last_(\d+)", layers)
        if layers == "all":
            return dense
        if layers == "every_2" and any(i % 2 for i in dense):
            return [i for i in dense if i % 2]
        if last and 1 <= int(last[1]) <= len(dense):
            return dense[-int(last[1]) :]
    elif isinstance(layers, (list, tuple)) and layers:
        if all(is_int(i) and i in dense for i in layers):
            if len(set(layers)) == len(layers):
                return sorted(layers)
    raise ValueError(
        f"`layers` must be 'all', 'every_2', 'last_n' with n from 1 to "
        f"{len(dense)}, or a list of different numbers of {dense}. Received: "
        f"layers={layers!r}, feed-forwards: "
        + ", ".join(f"{i} {found[i].name}" for i in dense)
    )


def _moe(place, num_experts, options, recipe, rng, check):
    """A built layer of experts that are made of a dense network."""
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
        name="moe" if place.owner else f"{place.up.name}_moe",
        **kwargs,
    )
    if moe.router.needs_context:
        raise ValueError(
            "`router` must decide by the tokens alone. "
            f"Received: router={moe.router!r}"
        )
    with name_scope_of(place.owner):
        moe.build((None, None, place.input_dim))
    if check and recipe.intermediate_dim is None:
        copies = expert_weights(
            weights, num_experts, Recipe(None, recipe.sampling, 0, 0), rng
        )
        _assign(moe, copies)
        _warn_if_different(moe, place)
    _assign(moe, expert_weights(weights, num_experts, recipe, rng))
    moe.trainable = place.up.trainable
    return moe


def _own(part):
    """A layer of its own for each block."""
    if isinstance(part, keras.layers.Layer):
        return keras.saving.deserialize_keras_object(serialize_part(part))
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


def _with_experts(layer, experts):
    """A copy of a layer or model with experts in the places of numbers."""
    inner = _backbone(layer)
    if inner is not None:
        config = layer.get_config()
        for name in ("frozen_layers", "frozen_weights"):
            config.pop(name, None)
        config["backbone"] = _with_experts(inner, experts)
        if getattr(layer, "preprocessor", None) is not None:
            config["preprocessor"] = layer.preprocessor
        new = type(layer).from_config(config)
        for old, part in zip(layer.layers, new.layers, strict=True):
            if old is not inner:
                _copy(old, part)
        if hasattr(type(layer), "backbone_cls"):
            put_experts(new, {})  # keras-hub asks for the class
        return new
    if graphs.is_graph(layer):
        return _graph_with_experts(layer, experts)
    new = _again(layer)
    put_experts(new, experts)
    return new


def _graph_with_experts(model, experts):
    pairs, _ = graphs.pairs_of(model)
    replaced, start, gone = {}, 0, set()
    for part in model.layers:
        if part.name in pairs:
            if start in experts:
                replaced[part.name] = experts[start]
                gone |= {*pairs[part.name].between, pairs[part.name].down.name}
            start += 1
            continue
        number = len(_found(part)[0])
        inside = {
            i - start: moe
            for i, moe in experts.items()
            if start <= i < start + number
        }
        if inside:
            replaced[part.name] = _with_experts(part, inside)
        start += number
    new = graphs.with_layers(model, replaced, pairs)
    for old in model.layers:
        if old.name not in gone:
            source = replaced.get(old.name, old)
            _copy(source, new.get_layer(source.name))
    return new


def _again(layer):
    """A copy of a layer or model, not compiled."""
    config = keras.saving.serialize_keras_object(layer)
    config.pop("compile_config", None)
    config["config"] = {**data_format_of(layer), **config["config"]}
    new = keras.saving.deserialize_keras_object(config)
    _copy(layer, new)
    return new


def _copy(old, new):
    """The weights of a layer, and what of it is frozen."""
    if isinstance(old, EncoderBlock):
        # Where a layer was replaced, its weights come last.
        for name, part in attributes_of(old):
            _copy(part, getattr(new, name))
        return
    new.set_weights(old.get_weights())
    parts = with_sublayers(old), with_sublayers(new)
    if len(parts[0]) == len(parts[1]):
        for before, after in zip(*parts, strict=True):
            if after.trainable != before.trainable:
                after.trainable = before.trainable
    for before, after in zip(old.weights, new.weights, strict=True):
        if after.trainable != before.trainable:
            after.trainable = before.trainable
