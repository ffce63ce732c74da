"""The router of MoE++, through public arguments."""

from keras_moe.routers.mlp_router import MLPRouter

GATE = "w/moe.gate."


def matches(config, arrays):
    return f"{GATE}gate_map.weight" in arrays


def router_from_case(config, arrays):
    """A built `MLPRouter` with the weights of the case.

    Its context is the case's `gate_residual_in`, if there is one.
    """
    mixtral = config.get("moe_use_mixtral_gating", False)
    target = config.get("moe_gate_norm_std", 1.0)
    hidden = arrays.get(f"{GATE}wg.0.weight")
    router = MLPRouter(
        config["E"],
        top_k=config["k"],
        hidden_dims=() if hidden is None else (len(hidden),),
        activation="tanh",
        use_hidden_bias=False,
        residual="logits",
        standardize_logits=target
        if config.get("moe_use_logits_norm")
        else None,
        # The last expert gives zero. In Mixtral's gating it keeps its share.
        zero_weight_experts=0 if mixtral else 1,
        score_after_selection=mixtral,
        name="router",
    )
    router.build((None, arrays["x"].shape[-1]))
    if hidden is not None:
        router.hidden_kernel_0.assign(hidden.T)
    last = "wg.weight" if hidden is None else "wg.2.weight"
    router.kernel.assign(arrays[f"{GATE}{last}"].T)
    router.context_kernel.assign(arrays[f"{GATE}gate_map.weight"].T)
    return router
