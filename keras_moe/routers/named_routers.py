import keras

from keras_moe.routers.cosine_router import CosineRouter
from keras_moe.routers.dense_router import DenseRouter
from keras_moe.routers.expert_choice_router import ExpertChoiceRouter
from keras_moe.routers.gshard_router import GShardRouter
from keras_moe.routers.noisy_top_k_router import NoisyTopKRouter
from keras_moe.routers.top_k_router import TopKRouter


def _v_moe(num_experts=32, **kwargs):
    kwargs = {
        "noise_stddev": 1.0 / num_experts,
        "score_after_selection": False,
        "normalize_weights": False,
        "load_threshold": "shared",
        **kwargs,
    }
    return NoisyTopKRouter(num_experts, **kwargs)


def _swin_moe_cosine(num_experts=32, **kwargs):
    return CosineRouter(
        num_experts, **{"noise_stddev": 1.0 / num_experts, **kwargs}
    )


# Class and arguments by name; `get` documents them.
_NAMED = {
    "top_k": (TopKRouter, {}),
    "switch": (TopKRouter, {"top_k": 1, "jitter": 1e-2}),
    "noisy_top_k": (NoisyTopKRouter, {"top_k": 4}),
    "gshard": (GShardRouter, {"top_k": 2, "threshold": 0.5}),
    "glam": (GShardRouter, {"num_experts": 64, "top_k": 2, "threshold": 0.5}),
    "st_moe": (GShardRouter, {"top_k": 2, "threshold": 0.2}),
    "expert_choice": (ExpertChoiceRouter, {"capacity_factor": 2.0}),
    "mixtral": (
        TopKRouter,
        {"num_experts": 8, "top_k": 2, "score_after_selection": True},
    ),
    "deepseek_v3": (
        TopKRouter,
        {
            "num_experts": 256,
            "top_k": 8,
            "score_activation": "sigmoid",
            "weight_scale": 2.5,
            "num_expert_groups": 8,
            "top_k_groups": 4,
            "group_score": 2,
            "expert_bias": True,
            "bias_update_rate": 1e-3,
        },
    ),
    "kimi_k2": (
        TopKRouter,
        {
            "num_experts": 384,
            "top_k": 8,
            "score_activation": "sigmoid",
            "weight_scale": 2.827,
            "expert_bias": True,
            "bias_update_rate": 1e-3,
        },
    ),
    "v_moe": (_v_moe, {"top_k": 2}),
    "dit_moe": (TopKRouter, {"top_k": 2, "normalize_weights": False}),
    "swin_moe_cosine": (_swin_moe_cosine, {"top_k": 1}),
    "jacobs": (DenseRouter, {}),
}


def get(identifier, **kwargs):
    """A router from its name, its config or itself.

    A name stands for a kind of router, or for the router of a published system
    with the published numbers:

    - `"top_k"`: `TopKRouter` with its defaults.
    - `"jacobs"`: `DenseRouter`, all experts (Jacobs et al., 1991).
    - `"noisy_top_k"`: `NoisyTopKRouter`, 4 experts, learned noise (Shazeer et
      al., 2017, section 2.1).
    - `"gshard"`: `GShardRouter`, 2 experts, threshold 0.5 (Lepikhin et al.,
      2020, algorithm 1).
    - `"switch"`: `TopKRouter`, 1 expert, its weight the probability, jitter
      0.01 (Fedus et al., 2021, sections 2.1 and 2.4).
    - `"glam"`: `GShardRouter`, 2 of 64 experts, as GShard (Du et al., 2021,
      section 4).
    - `"v_moe"`: `NoisyTopKRouter`, 2 of 32 experts, noise of width
      1 / experts, weights not normalized (Riquelme et al., 2021, appendix A).
    - `"swin_moe_cosine"`: `CosineRouter`, 1 of 32 experts, noise of width
      1 / experts (Hwang et al., 2022, and the released Swin-MoE models).
    - `"st_moe"`: `GShardRouter`, 2 experts, threshold 0.2 (Zoph et al., 2022,
      appendix C).
    - `"dit_moe"`: `TopKRouter`, 2 experts, weights not normalized (Fei et al.,
      2024, section 2).
    - `"expert_choice"`: `ExpertChoiceRouter`, capacity factor 2 (Zhou et al.,
      2022, section 4).
    - `"mixtral"`: `TopKRouter`, 2 of 8 experts, softmax of the chosen (Jiang
      et al., 2024, section 2.1).
    - `"deepseek_v3"`: `TopKRouter`, 8 of 256 experts in 4 of 8 groups,
      sigmoid, expert bias with rate 0.001, scale 2.5 (DeepSeek-AI, 2024,
      sections 2.1.2 and 4.2).
    - `"kimi_k2"`: `TopKRouter`, 8 of 384 experts, sigmoid, expert bias, scale
      2.827 (Kimi Team, 2025, and its released configuration).

    Losses, capacities and shared experts of these systems belong to `MoE`.

    Args:
        identifier: A name of the list, a config dict of
            `keras.saving.serialize_keras_object`, or a router, which is
            returned as it is.
        **kwargs: Arguments of the router, with a name alone. They override what
            the name stands for. Give `num_experts` where the list has none.

    Returns:
        A router layer.

    Raises:
        ValueError: If the name is not known, `identifier` is nothing of this
            kind, or arguments are given with a config or a router.

    Example:

    >>> keras_moe.routers.get("switch", num_experts=4).top_k
    1
    >>> keras_moe.routers.get("deepseek_v3").num_experts
    256
    """
    if isinstance(identifier, str):
        if identifier not in _NAMED:
            raise ValueError(
                f"`router` must be one of {tuple(_NAMED)} or a router layer. "
                f"Received: router={identifier!r}"
            )
        make, defaults = _NAMED[identifier]
        return make(**{**defaults, **kwargs})
    if kwargs:
        raise ValueError(
            "`router` must be a name where arguments are given. "
            f"Received: router={identifier!r}, {kwargs}"
        )
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if not isinstance(identifier, keras.layers.Layer):
        raise ValueError(
            "`router` must be a name or a layer. "
            f"Received: router={identifier!r}"
        )
    return identifier
