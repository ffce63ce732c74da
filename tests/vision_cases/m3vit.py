"""Vision transformers of VITA-Group/M3ViT, as `MultiTaskVisionMoE`."""

import keras
import numpy as np

from keras_moe.models import MultiTaskVisionMoE
from tests.recommendation_cases.recorded import Recorded
from tests.vision_cases import torch_weights


def matches(case):
    return case.get("family") == "m3vit"


def model_from_case(case, arrays, losses=None):
    """The model, whose heads give all tokens, and its `Recorded` weights."""
    config, recorded = case["config"], Recorded(arrays)
    channels, *image_size = arrays["x"].shape[1:]
    experts = recorded.weights["blocks.1.mlp.experts.htoh4.weight"]
    vector = "gate_task_represent"
    options = {"router": "per_task"}
    if not config.get("multi_gate"):
        width = len(recorded.weights[f"{vector}.fc2.weight"])
        options = {"router": "task_vector", "task_dim": width}
    model = MultiTaskVisionMoE(
        {f"task{task}": keras.layers.Identity() for task in case["tasks"]},
        image_shape=(*image_size, channels),
        patch_size=config["patch_size"],
        num_layers=config["depth"],
        num_heads=config["num_heads"],
        hidden_dim=config["embed_dim"],
        mlp_dim=int(config["embed_dim"] * config["mlp_ratio"]),
        num_experts=config["moe_experts"],
        expert_dim=experts.shape[1],
        top_k=config["moe_top_k"],
        router_noise=config["vmoe_noisy_std"],
        losses=losses,
        pooling=None,
        final_norm=False,
        data_format="channels_last",
        **options,
    )
    embedding = model.get_layer("patch_embedding")
    torch_weights.put_patches(recorded, embedding, "patch_embed.proj")
    recorded.put(embedding.class_token, "cls_token")
    recorded.put(embedding.positions, "pos_embed")
    if options["router"] == "task_vector":
        for number in (1, 2):
            layer = model.get_layer(f"task_vector_{number}")
            torch_weights.put_dense(recorded, layer, f"{vector}.fc{number}")
        norm = model.get_layer("task_vector_norm")
        torch_weights.put_norm(recorded, norm, f"{vector}.norm")
    for number in range(config["depth"]):
        put_block(recorded, model.block(number), f"blocks.{number}", case)
    return model, recorded


def put_block(recorded, block, name, case):
    torch_weights.put_norm(recorded, block.attention_norm, f"{name}.norm1")
    torch_weights.put_norm(recorded, block.feed_forward_norm, f"{name}.norm2")
    torch_weights.put_attention(recorded, block.attention, f"{name}.attn")
    layer = block.feed_forward
    if not recorded.has(f"{name}.mlp.experts"):
        for number in (1, 2):
            dense = getattr(layer, f"dense_{number}")
            torch_weights.put_dense(recorded, dense, f"{name}.mlp.fc{number}")
        return
    for kind, theirs in (("up", "htoh4"), ("down", "h4toh")):
        experts = f"{name}.mlp.experts.{theirs}"
        recorded.put(
            getattr(layer.experts, f"{kind}_kernel"),
            f"{experts}.weight",
            to=lambda value: np.swapaxes(value, 1, 2),
            back=lambda value: np.swapaxes(value, 1, 2),
        )
        recorded.put(getattr(layer.experts, f"{kind}_bias"), f"{experts}.bias")
    kernel = layer.router.kernel
    if len(kernel.shape) == 2:
        recorded.put(kernel, f"{name}.mlp.gate.w_gate")
        return
    for task in case["tasks"]:
        recorded.put(kernel, f"{name}.mlp.gate.{task}.w_gate", task)
