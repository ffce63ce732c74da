"""MoE Jetpack in a vision transformer of timm, from public parts."""

import re

from keras_moe.experts import MixedExperts
from keras_moe.experts import MLPExperts
from keras_moe.models import SoftMoEBackbone
from keras_moe.routers import SpheroRouter
from tests.vision_cases import timm

KINDS = ("core", "univ")


def matches(meta, arrays):
    return "core_experts" in meta.get("config", {})


def moe_blocks(case):
    return sorted(case.config["moe_layers"])


def model_from_case(case):
    """A `timm.Filled` of a functional model with channels last."""
    config = case.config
    block = f"w/blocks.{moe_blocks(case)[0]}.mlp."
    experts, slots, _ = case.arrays[f"{block}phi"].shape
    banks = []
    for kind in KINDS:
        bias = case.arrays.get(f"{block}{kind}_experts.vit_fc1.bias")
        if bias is not None:
            banks.append(MLPExperts(*bias.shape, activation="gelu", name=kind))
    noise = config["noise_mult"] if config.get("add_noise") else 0.0
    backbone = SoftMoEBackbone(
        **timm.arguments(case, config),
        num_experts=experts,
        moe_layers=moe_blocks(case),
        router=SpheroRouter(
            experts,
            slots,
            normalize_slots=config["slot_layernorm"],
            noise_stddev=noise,
            name="router",
        ),
        experts=MixedExperts(banks, name="experts"),
    )
    return timm.Filled(
        timm.classifier(backbone, config),
        case,
        places,
        {
            "phi$": lambda value: value.transpose(2, 0, 1),
            r"fc\d\.bias$": lambda value: value,
            r"fc\d\.weight$": lambda value: value.swapaxes(-2, -1),
        },
    )


_ROUTER = {
    "slot_kernel": "phi",
    "slot_gain": "slot_norm.weight",
    "slot_bias": "slot_norm.bias",
    "dispatch_temperature": "scales.0",
    "combine_temperature": "scales.1",
}


def places(path):
    found = re.fullmatch(r"block_(\d+)/moe/(.+)/(\w+)", path)
    if found is None:
        return None
    block, part, name = found.groups()
    mlp = f"blocks.{block}.mlp."
    if part == "router":
        return [timm.Place(mlp + _ROUTER[name])]
    layer, kind = name.split("_")
    layer = {"up": "vit_fc1", "down": "vit_fc2"}[layer]
    kind = "bias" if kind == "bias" else "weight"
    bank = part.split("/")[-1]
    return [timm.Place(f"{mlp}{bank}_experts.{layer}.{kind}")]
