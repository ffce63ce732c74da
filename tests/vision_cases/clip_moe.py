"""The image tower of CLIP-MoE, from Keras' layers and ours."""

import keras
import numpy as np
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from keras_moe.routers import TopKRouter
from tests.recommendation_cases.recorded import Recorded
from tests.vision_cases import encoder_parts as parts

EPSILON = 1e-5


def matches(meta, arrays):
    return meta.get("family") == "clip_moe"


def moe(recorded, x, name, config):
    """`(outputs, routing)` of a layer of experts in a graph."""
    experts, top_k, dropout, _ = config["MoE_args"]
    width = len(recorded.weights[f"{name}experts.0.c_fc.weight"])
    layer = MoE(
        router=TopKRouter(experts, top_k),
        experts=MLPExperts(
            experts, width, activation="quick_gelu", dropout=dropout
        ),
        # The original's is `top_k` at balance, ours 1.
        losses=[LoadBalancingLoss(float(top_k))],
        return_routing=True,
        statistics=None,
    )
    y, routing = layer(x)
    if top_k == 1:
        # The original divides by the sum here too: its router learns by the
        # loss alone, which our router refuses to be made for.
        y = y / ops.reshape(routing.expert_weights, (-1, *x.shape[1:2], 1))
    recorded.put(
        layer.router.kernel,
        f"{name}gate.weight",
        to=np.transpose,
        back=np.transpose,
    )
    for number in range(experts):
        for part, kind in (("c_fc", "up"), ("c_proj", "down")):
            at = f"{name}experts.{number}.{part}"
            recorded.put(
                getattr(layer.experts, f"{kind}_kernel"),
                f"{at}.weight",
                number,
                np.transpose,
                np.transpose,
            )
            recorded.put(
                getattr(layer.experts, f"{kind}_bias"), f"{at}.bias", number
            )
    return y, routing, layer


def kept_weights(routing):
    weights = routing.expert_weights
    return weights / ops.sum(weights, axis=-1, keepdims=True)


def model_from_case(case):
    """A functional model, its `Recorded`, and the `MoE` by block.

    The model takes `x`, images with channels last, and gives a dict of `y`,
    `auxiliary_loss`, pooled over all layers of experts, and for each of them
    the `logits` and the `combine` weights, in the order of image and token.
    """
    config, recorded = case.config, Recorded(case.arrays)
    number, _, _, with_experts = config["MoE_args"]
    _, channels, *size = case.arrays["x"].shape
    inputs = keras.Input((*size, channels), name="x")
    x = parts.patch_embedding(
        recorded, inputs, "conv1", "positional_embedding", "class_embedding"
    )
    x = parts.norm(recorded, x, "ln_pre", EPSILON)
    outputs, layers, shares, probs = {}, {}, [], []
    for i in range(config["layers"]):
        at = f"transformer.resblocks.{i}."
        names = {"norm1": "ln_1", "attention": "attn", "norm2": "ln_2"}
        names |= {"up": "mlp.c_fc", "down": "mlp.c_proj"}
        names = {key: at + name for key, name in names.items()}
        if i < config["layers"] - with_experts:
            x, *_ = parts.encoder_block(
                recorded, x, names, config["heads"], EPSILON, "quick_gelu"
            )
            continue
        y = parts.norm(recorded, x, names["norm1"], EPSILON)
        x = x + parts.attention(
            recorded, y, names["attention"], config["heads"], EPSILON
        )
        y = parts.norm(recorded, x, names["norm2"], EPSILON)
        y, routing, layers[i] = moe(recorded, y, at, config)
        x = x + y
        chosen = ops.one_hot(routing.expert_indices, number)  # (T, K, E)
        outputs[f"route/{i}/logits"] = routing.logits
        outputs[f"route/{i}/combine"] = ops.sum(
            chosen * kept_weights(routing)[..., None], axis=1
        )
        shares.append(ops.mean(ops.sum(chosen, axis=1), axis=0))
        probs.append(ops.mean(routing.probs, axis=0))
    pooled = [sum(values) / len(values) for values in (shares, probs)]
    outputs["auxiliary_loss"] = number * ops.sum(pooled[0] * pooled[1])
    y = parts.norm(recorded, x[:, 0], "ln_post", EPSILON)
    projection = keras.layers.Dense(config["output_dim"], use_bias=False)
    outputs["y"] = projection(y)
    recorded.put(projection.kernel, "proj")
    return keras.Model({"x": inputs}, outputs), recorded, layers
