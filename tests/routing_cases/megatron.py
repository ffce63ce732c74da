"""Megatron-LM's top-k routing, from logits."""

import numpy as np

from keras_moe import layers
from keras_moe import routers
from tests.routing_cases import cases

_SCORES = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "sqrtsoftplus": "sqrt_softplus",
}


def matches(config, arrays):
    return "score_function" in config and "combine" in arrays


def is_quantile_balancing(config, arrays):
    """A step of the bias `beta`, which is taken off the scores."""
    return {"scores", "beta", "beta_new"} <= set(arrays)


def quantile_router_from_case(config, arrays):
    """Its tokens are the scores; its bias is minus theirs."""
    num_experts = arrays["scores"].shape[-1]
    router = routers.TopKRouter(
        num_experts,
        config.get("k", 2),
        expert_bias="logits",
        bias_update="quantile",
        bias_update_rate=1.0 - config.get("ema", 0.0),
    )
    router.build((None, num_experts))
    router.kernel.assign(np.eye(num_experts))
    router.expert_bias.assign(-arrays["beta"])
    return router


def router_from_case(config, arrays):
    """Its tokens are the logits: the kernel is the identity."""
    softmax = config["score_function"] == "softmax"
    before = bool(config.get("use_pre_softmax"))
    top_k = config.get("k", 2)
    options = {
        "score_after_selection": softmax and not before,
        # Of a softmax, neither form is normalized by itself.
        "normalize_weights": not softmax,
        "weight_scale": config.get("scaling_factor") or 1.0,
    }
    if config.get("num_groups"):
        options["num_expert_groups"] = config["num_groups"]
        options["top_k_groups"] = config["group_topk"]
        options["group_score"] = top_k // config["group_topk"]
    bias = arrays.get("expert_bias", config.get("expert_bias"))
    router = routers.TopKRouter(
        config["E"],
        top_k,
        score_activation=_SCORES[config["score_function"]],
        expert_bias=bias is not None,
        name="router",
        **options,
    )
    router.build((None, config["E"]))
    router.kernel.assign(np.eye(config["E"]))
    if bias is not None:
        router.expert_bias.assign(np.asarray(bias))
    return router


def layer_from_case(config, arrays, outputs=None, **kwargs):
    """Its experts return rows of `outputs`, `(E, F)`, whatever they get."""
    num_experts = config["E"]
    outputs = np.zeros((num_experts, 1)) if outputs is None else outputs
    width = outputs.shape[1]
    return cases.moe_with_linear_experts(
        router_from_case(config, arrays),
        np.zeros((num_experts, num_experts, width), "float32"),
        outputs.astype("float32"),
        capacity=layers.Capacity(
            config["capacity_factor"],
            eval_capacity_factor=float("inf"),
            drop_policy="weight",
        ),
        **kwargs,
    )
