"""Diffusion transformers of feizc/DiT-MoE, as `DiTMoEBackbone`."""

import numpy as np

from keras_moe.models import DiTMoEBackbone
from tests.recommendation_cases.recorded import Recorded
from tests.vision_cases import torch_weights


def matches(case):
    return case.get("family") == "dit_moe"


def model_from_case(case, arrays):
    """The backbone, and the `Recorded` weights in it."""
    config, recorded = case["config"], Recorded(arrays)
    shared = recorded.weights["blocks.0.moe.shared_experts.gate_proj.weight"]
    model = DiTMoEBackbone(
        **sizes(config, recorded),
        num_heads=config["num_heads"],
        mlp_dim=int(config["mlp_ratio"] * config["hidden_size"]),
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        group_size=None,
        num_shared_experts=1,
        shared_mlp_dim=len(shared),
    )
    put_ends(recorded, model)
    for number in range(config["depth"]):
        block, name = model.block(number), f"blocks.{number}"
        put_block(recorded, block, name)
        torch_weights.put_attention(recorded, block.attention, f"{name}.attn")
        put_moe(recorded, block.feed_forward, f"{name}.moe")
    return model, recorded


def sizes(config, recorded):
    """Arguments of the backbone that all diffusion transformers have."""
    size, channels = config["input_size"], config["in_channels"]
    patch = config["patch_size"]
    outputs = len(recorded.weights["final_layer.linear.weight"])
    return {
        "image_shape": (size, size, channels),
        "patch_size": patch,
        "num_layers": config["depth"],
        "hidden_dim": config["hidden_size"],
        "num_classes": config["num_classes"],
        "label_dropout": config["class_dropout_prob"],
        "learn_sigma": outputs == 2 * channels * patch**2,
        # They are weights of the original, which it does not train.
        "positions": "learned",
        "data_format": "channels_last",
    }


def put_ends(recorded, model):
    embedding = model.get_layer("patch_embedding")
    torch_weights.put_patches(recorded, embedding, "x_embedder.proj")
    recorded.put(embedding.positions, "pos_embed")
    condition, head = model.get_layer("condition"), model.get_layer("head")
    for layer, name in (
        (condition.dense_1, "t_embedder.mlp.0"),
        (condition.dense_2, "t_embedder.mlp.2"),
        (head.modulation, "final_layer.adaLN_modulation.1"),
        (head.dense, "final_layer.linear"),
    ):
        torch_weights.put_dense(recorded, layer, name)
    recorded.put(
        condition.embedding.embeddings, "y_embedder.embedding_table.weight"
    )


def put_block(recorded, block, name):
    torch_weights.put_dense(
        recorded, block.modulation, f"{name}.adaLN_modulation.1"
    )


def put_moe(recorded, layer, name):
    torch_weights.put_kernel(
        recorded, layer.router.kernel, f"{name}.gate.weight"
    )
    experts = [f"{name}.experts.{e}" for e in range(layer.num_experts)]
    for kind in ("gate", "up", "down"):
        for bank, prefixes in (
            (layer.experts, experts),
            (layer.shared_experts, [f"{name}.shared_experts"]),
        ):
            for number, prefix in enumerate(prefixes):
                torch_weights.put_kernel(
                    recorded,
                    getattr(bank, f"{kind}_kernel"),
                    f"{prefix}.{kind}_proj.weight",
                    number,
                )


def inputs_of(arrays):
    return {
        "images": images_last(arrays["x"]),
        "timesteps": arrays["t"],
        "labels": arrays["labels"].astype("int32"),
    }


def images_last(value):
    """Images with channels last; other arrays as they are."""
    return np.moveaxis(value, 1, -1) if value.ndim == 4 else value
