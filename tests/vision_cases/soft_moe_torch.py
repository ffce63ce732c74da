"""Soft MoE in a vision transformer of timm, as others than its authors do it.

bwconrad/soft-moe and lucidrains/soft-moe-pytorch.
"""

import re

import numpy as np

from keras_moe.experts import MLPExperts
from keras_moe.models import SoftMoEBackbone
from keras_moe.routers import SoftRouter
from tests.vision_cases import timm


def is_lucidrains(meta):
    return "soft_moe" in meta.get("config", {})


def matches(meta, arrays):
    config = meta.get("config", {})
    return is_lucidrains(meta) or "moe_layer_index" in config


def vit_of(case):
    """The configuration of timm's part."""
    return case.config["vit"] if is_lucidrains(case.meta) else case.config


def moe_blocks(case):
    if is_lucidrains(case.meta):
        return [case.config["block"]]
    where = case.config["moe_layer_index"]
    if isinstance(where, list):
        return sorted(where)
    return list(range(where, case.config["depth"]))


def parts(case):
    """The router and the experts of each block."""
    block = f"w/blocks.{moe_blocks(case)[0]}.mlp."
    if not is_lucidrains(case.meta):
        _, experts, slots = case.arrays[f"{block}phi"].shape
        width = len(case.arrays[f"{block}experts.0.fc1.bias"])
        # Tokens are divided by their length itself.
        router = SoftRouter(
            experts, slots, epsilon=1e-24, mix_normalized=True, name="router"
        )
        return router, MLPExperts(
            experts, width, activation="gelu", name="experts"
        )
    experts, slots, _ = case.arrays[f"{block}slot_embeds"].shape
    layer_norm = case.config["soft_moe"].get("use_layernorm", False)
    router = SoftRouter(
        experts,
        slots,
        normalization="layer" if layer_norm else "rms",
        epsilon=1e-5 if layer_norm else 1e-12,
        mix_normalized=True,
        name="router",
    )
    expert = f"{block}experts.experts.0."
    width = case.arrays[f"{expert}3.weight"].shape[1]
    if len(case.arrays[f"{expert}0.bias"]) != width:
        raise NotImplementedError("Experts with a gate are not read.")
    return router, MLPExperts(experts, width, activation="gelu", name="experts")


def model_from_case(case):
    """A `timm.Filled` of a functional model with channels last."""
    config = vit_of(case)
    router, experts = parts(case)
    backbone = SoftMoEBackbone(
        **timm.arguments(case, config),
        num_experts=router.num_experts,
        moe_layers=moe_blocks(case),
        router=router,
        experts=experts,
    )
    return timm.Filled(
        timm.classifier(backbone, config),
        case,
        lambda path: places(path, router.num_experts, is_lucidrains(case.meta)),
        {
            "slot_embeds$": lambda value: value.transpose(2, 0, 1),
            "phi$": lambda value: value,
        },
    )


_ROUTER = {
    True: {
        "slot_kernel": "slot_embeds",
        "token_gain": "norm.gamma",
        "slot_gain": "slot_norm.gamma",
    },
    False: {"slot_kernel": "phi", "scale": "scale"},
}


def places(path, experts, lucidrains):
    found = re.fullmatch(r"block_(\d+)/moe/(router|experts)/(\w+)", path)
    if found is None:
        return None
    block, part, name = found.groups()
    mlp = f"blocks.{block}.mlp."
    if part == "router":
        return [timm.Place(mlp + _ROUTER[lucidrains][name])]
    layer, kind = name.split("_")
    kind = "bias" if kind == "bias" else "weight"
    if lucidrains:
        inner = f"experts.experts.{{}}.{3 if layer == 'down' else 0}.{kind}"
    else:
        inner = f"experts.{{}}.fc{2 if layer == 'down' else 1}.{kind}"
    return [timm.Place(mlp + inner.format(e), e) for e in range(experts)]


def images_last(value):
    return np.transpose(value, (0, 2, 3, 1))
