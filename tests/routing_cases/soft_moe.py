"""Soft MoE as vmoe and soft-moe-pytorch have it, through public arguments."""

from keras_moe.moe.soft_moe import SoftMoE
from keras_moe.routers.soft_router import SoftRouter
from tests.routing_cases.cases import LinearExperts
from tests.routing_cases.cases import recorded_draws


def is_vmoe(config, arrays):
    return "slots_per_expert" in config and {"mu", "scale"} <= set(arrays)


def is_soft_moe_pytorch(config, arrays):
    return "slots_per_expert" in config and "slot_embeds" in arrays


def matches(config, arrays):
    return is_vmoe(config, arrays) or is_soft_moe_pytorch(config, arrays)


def variables_from_case(arrays):
    """The recorded weights by the paths of a layer's variables."""
    variables = {
        "experts/kernel": arrays["expert/W"],
        "experts/bias": arrays["expert/b"],
    }
    if "mu" in arrays:
        variables["router/slot_kernel"] = arrays["mu"]
        variables["router/scale"] = arrays["scale"]
    else:
        slots = arrays["slot_embeds"]  # (E, P, D)
        variables["router/slot_kernel"] = slots.transpose(2, 0, 1)
        variables["router/token_gain"] = arrays["norm_gamma"]
        variables["router/slot_gain"] = arrays["slot_norm_gamma"]
    return variables


def router_options(config, arrays):
    options = {
        "num_experts": config["E"],
        "slots_per_expert": config["slots_per_expert"],
    }
    if is_vmoe(config, arrays):
        noise = config.get("noise_std", 0.0)
        return {**options, "noise_stddev": noise if noise else 0.0}
    layer_norm = config.get("use_layernorm", False)
    return {
        **options,
        "normalization": "layer" if layer_norm else "rms",
        # It divides by the norm itself, or as LayerNorm of torch does.
        "epsilon": 1e-5 if layer_norm else 1e-12,
        "mix_normalized": True,
        "gumbel_noise": float("gumbel_uniform" in arrays),
    }


def router_from_case(config, arrays):
    """A built `SoftRouter` with the weights of the case."""
    return layer_from_case(config, arrays).router


def layer_from_case(config, arrays):
    """A built `SoftMoE` with the weights of the case."""
    layer = SoftMoE(
        router=SoftRouter(name="router", **router_options(config, arrays)),
        experts=LinearExperts(
            config["E"], arrays["expert/W"].shape[-1], name="experts"
        ),
        name="layer",
    )
    layer.build(arrays["x"].shape)
    values = variables_from_case(arrays)
    for variable in layer.trainable_variables:
        variable.assign(values.pop(variable.path.split("/", 1)[1]))
    if values:
        raise ValueError(f"The layer has no {sorted(values)}")
    return layer


def draws_of(arrays):
    """Draws what the case recorded, and nothing else."""
    return recorded_draws(
        normal=(arrays["noise_unit"],) if "noise_unit" in arrays else (),
        uniform=(arrays["gumbel_uniform"],)
        if "gumbel_uniform" in arrays
        else (),
        again=True,
    )
