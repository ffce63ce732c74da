"""Soft MoE of google-research/vmoe, from public classes."""

from keras_moe.models import MoEImageClassifier
from keras_moe.models import SoftMoEBackbone
from tests.vision_cases import vmoe


def matches(meta, arrays):
    router = vmoe.router_of(meta) if "encoder" in meta.get("config", {}) else {}
    return router.get("name", "").endswith("SoftRouter")


def model_from_case(case):
    moe = case.config["encoder"]["moe"]
    router = moe["router"]
    slots = router.get("num_slots")
    if slots is None:
        share = moe["group_size"] / moe["num_experts"]
        slots = round(share * router["capacity_factor"])
    backbone = SoftMoEBackbone(
        **vmoe.encoder_arguments(case),
        num_experts=moe["num_experts"],
        slots_per_expert=slots,
        moe_layers=moe["layers"],
        router_noise=router.get("noise_std", 0.0),
    )
    return vmoe.classifier(MoEImageClassifier, backbone, case)
