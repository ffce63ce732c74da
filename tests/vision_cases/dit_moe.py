"""Diffusion transformers of Keras' layers, whose feed-forwards are `MoE`."""

import keras
import numpy as np
from keras import ops

from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from keras_moe.routers import TopKRouter
from tests.recommendation_cases.recorded import Recorded

EPSILON = 1e-6


def matches(case):
    return case.get("family") == "dit_moe"


def transpose(value):
    return np.transpose(value)


def moe(recorded, config, name):
    """The routed feed-forward of a block, and its shared expert."""
    weights, experts = recorded.weights, config["num_experts"]
    dim, width = weights[f"{name}.experts.0.down_proj.weight"].shape
    shared = f"{name}.shared_experts"
    layer = MoE(
        router=TopKRouter(
            experts, config["num_experts_per_tok"], normalize_weights=False
        ),
        experts=GLUExperts(experts, width, activation="silu"),
        shared_experts=GLUExperts(
            1, weights[f"{shared}.down_proj.weight"].shape[1], activation="silu"
        ),
        losses=[LoadBalancingLoss(0.01)],
        statistics=None,
    )
    layer.build((None, None, dim))
    recorded.put(
        layer.router.kernel, f"{name}.gate.weight", to=transpose, back=transpose
    )
    for kind in ("gate", "up", "down"):
        for bank, prefixes in (
            (layer.experts, [f"{name}.experts.{e}" for e in range(experts)]),
            (layer.shared_experts, [shared]),
        ):
            for number, prefix in enumerate(prefixes):
                recorded.put(
                    getattr(bank, f"{kind}_kernel"),
                    f"{prefix}.{kind}_proj.weight",
                    number,
                    transpose,
                    transpose,
                )
    return layer


def attention(recorded, x, name, heads):
    dim = x.shape[-1]
    split = ops.reshape(
        recorded.dense(x, f"{name}.qkv"),
        (-1, x.shape[1], 3, heads, dim // heads),
    )
    queries, keys, values = (split[:, :, i] for i in range(3))
    y = ops.dot_product_attention(queries, keys, values)
    return recorded.dense(ops.reshape(y, (-1, *x.shape[1:])), f"{name}.proj")


def modulated(x, shift, scale):
    x = keras.layers.LayerNormalization(
        epsilon=EPSILON, center=False, scale=False
    )(x)
    return x * (1 + scale[:, None]) + shift[:, None]


def modulation(recorded, condition, name, parts):
    name = f"{name}adaLN_modulation.1"
    return ops.split(recorded.dense(condition, name), parts, axis=1)


def model_from_case(case, arrays):
    """A functional model, its `Recorded`, and the `MoE` of each block.

    The model takes a dict of `x`, images with channels last, `t` and `labels`.
    It gives a dict of `y`, the `time_features`, and what each `MoE` reads.
    """
    config, recorded = case["config"], Recorded(arrays)
    size, patch = config["input_size"], config["patch_size"]
    x = keras.Input((size, size, config["in_channels"]), name="x")
    t = keras.Input((), name="t")
    labels = keras.Input((), name="labels", dtype="int32")
    inputs = {"x": x, "t": t, "labels": labels}

    steps = np.exp(-np.log(10000) * np.arange(128) / 128).astype("float32")
    angles = t[:, None] * steps
    features = ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=1)
    time = ops.silu(recorded.dense(features, "t_embedder.mlp.0"))
    time = recorded.dense(time, "t_embedder.mlp.2")
    classes = recorded.embedding(labels, "y_embedder.embedding_table.weight")
    condition = ops.silu(time + classes)

    dim = config["hidden_size"]
    embed = keras.layers.Conv2D(
        dim, patch, strides=patch, data_format="channels_last"
    )
    x = ops.reshape(embed(x), (-1, (size // patch) ** 2, dim))
    recorded.put(
        embed.kernel,
        "x_embedder.proj.weight",
        to=lambda value: value.transpose(2, 3, 1, 0),
        back=lambda value: value.transpose(3, 2, 0, 1),
    )
    recorded.put(embed.bias, "x_embedder.proj.bias")
    x = x + recorded.weights["pos_embed"]
    outputs, layers = {"time_features": features}, []
    for number in range(config["depth"]):
        name = f"blocks.{number}."
        parts = modulation(recorded, condition, name, 6)
        y = modulated(x, *parts[:2])
        y = attention(recorded, y, f"{name}attn", config["num_heads"])
        x = x + parts[2][:, None] * y
        layers.append(moe(recorded, config, f"{name}moe"))
        outputs[f"in/{number}"] = y = modulated(x, *parts[3:5])
        x = x + parts[5][:, None] * layers[-1](y)
    parts = modulation(recorded, condition, "final_layer.", 2)
    y = recorded.dense(modulated(x, *parts), "final_layer.linear")
    sides = (size // patch, size // patch, patch, patch)
    y = ops.transpose(
        ops.reshape(y, (-1, *sides, y.shape[-1] // patch**2)),
        (0, 1, 3, 2, 4, 5),
    )
    outputs["y"] = ops.reshape(y, (-1, size, size, y.shape[-1]))
    return keras.Model(inputs, outputs), recorded, layers
