import re

import keras
import numpy as np

from keras_moe.checks import as_ints
from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.checks import check_number
from keras_moe.checks import check_one_of
from keras_moe.checks import check_seed
from keras_moe.checks import is_int
from keras_moe.conversion.dense_network import FeedForward
from keras_moe.conversion.expert_layers import moe_from
from keras_moe.conversion.model_copies import feed_forwards_of
from keras_moe.conversion.model_copies import with_experts
from keras_moe.conversion.recycled_weights import Recipe
from keras_moe.conversion.sublayers import classes_of


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
    found, looked_at = feed_forwards_of(model)
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
        i: moe_from(
            found[i], number, options, recipe, rng, check=i == chosen[0]
        )
        for i, number in zip(chosen, numbers, strict=True)
    }
    with keras.saving.custom_object_scope(classes_of(model)):
        return with_experts(model, experts)


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
