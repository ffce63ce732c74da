"""Swin-MoE of microsoft/Swin-Transformer with Tutel, from public classes."""

import numpy as np
from keras import ops

from keras_moe.losses import RoutingLoss
from keras_moe.models import MoEImageClassifier
from keras_moe.models import SwinMoEBackbone
from keras_moe.routers import CosineRouter

# What the original has where a case says nothing.
DEFAULTS = {
    "patch_size": 4,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "patch_norm": True,
    "ape": False,
    "mlp_fc2_bias": True,
    "top_value": 1,
    "capacity_factor": 1.25,
    "cosine_router": False,
    "normalize_gate": False,
    "use_bpr": True,
    "is_gshard_loss": True,
    "gate_noise": 1.0,
    "aux_loss_weight": 0.01,
}


def matches(meta, arrays):
    return {"moe_blocks", "window_size", "depths"} <= set(
        meta.get("config", {})
    )


def config_of(case):
    return {**DEFAULTS, **case.config}


def moe_blocks(config):
    """`(number, name in the original)` of each block with experts."""
    numbered = [
        (stage, block)
        for stage, depth in enumerate(config["depths"])
        for block in range(depth)
    ]
    return [
        (number, f"layers.{stage}.blocks.{block}")
        for number, (stage, block) in enumerate(numbered)
        if block in config["moe_blocks"][stage]
    ]


def model_from_case(case):
    """A `MoEImageClassifier` with the weights of the case."""
    config = config_of(case)
    weight, experts = config["aux_loss_weight"], config["num_local_experts"]
    gshard = config["is_gshard_loss"]
    backbone = SwinMoEBackbone(
        image_shape=case.arrays["x"].shape[1:],
        data_format="channels_first",
        patch_size=config["patch_size"],
        hidden_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
        pretrained_window_size=config.get("pretrained_window_sizes", 0),
        mlp_ratio=config["mlp_ratio"],
        use_output_bias=config["mlp_fc2_bias"],
        use_qkv_bias=config["qkv_bias"],
        patch_norm=config["patch_norm"],
        positions="learned" if config["ape"] else None,
        num_experts=experts,
        moe_layers=[number for number, _ in moe_blocks(config)],
        capacity_factor=config["capacity_factor"],
        eval_capacity_factor=None,  # the same in inference
        drop_policy="priority" if config["use_bpr"] else "position",
        importance_loss_weight=0.0 if gshard else weight / 2,
        # The original's is another: `MixedLoadLoss`.
        load_loss_weight=0.0,
        load_balancing_loss_weight=weight if gshard else 0.0,
        **router_arguments(case, config),
    )
    model = MoEImageClassifier(backbone, config["num_classes"])
    assign(model, case)
    return model


def router_arguments(case, config):
    """The arguments that say which router there is."""
    k, experts = config["top_value"], config["num_local_experts"]
    normalizes = bool(config["normalize_gate"] and k > 1)
    noise = config["gate_noise"]
    if not config["cosine_router"]:
        return {
            "router": "v_moe" if noise else "top_k",
            "router_noise": noise or None,
            "top_k": k,
            "normalize_weights": normalizes,
        }
    matrix = next(
        value
        for name, value in case.arrays.items()
        if name.startswith("w/") and name.endswith(".sim_matrix")
    )
    router = CosineRouter(
        experts,
        k,
        projection_dim=len(matrix),
        noise_stddev=noise / experts,
        normalize_weights=normalizes,
    )
    return {"router": router, "top_k": None}


def places(model, config):
    """`(name in the original, variable, to, back)` of every weight."""
    backbone = model.backbone
    yield from _dense("head", model.get_layer("predictions"))
    embedding = backbone.get_layer("patch_embedding")
    yield "patch_embed.proj.bias", embedding.projection.bias, None, None
    patch, channels = embedding.patch_size, backbone.input_shape[1]
    yield (
        "patch_embed.proj.weight",
        embedding.projection.kernel,
        lambda w: w.transpose(2, 3, 1, 0).reshape(-1, len(w)),
        lambda g: g.reshape(*patch, channels, -1).transpose(3, 2, 0, 1),
    )
    if embedding.norm is not None:
        yield from _norm("patch_embed.norm", embedding.norm)
    if embedding.positions is not None:
        yield "absolute_pos_embed", embedding.positions, None, None
    for stage in range(1, len(config["depths"])):
        merging = backbone.get_layer(f"merging_{stage}")
        name = f"layers.{stage - 1}.downsample"
        yield from _norm(f"{name}.norm", merging.norm)
        yield from _dense(f"{name}.reduction", merging.reduction)
    yield from _norm("norm", backbone.get_layer("norm"))
    number = 0
    for stage, depth in enumerate(config["depths"]):
        for i in range(depth):
            block = backbone.block(number)
            yield from _block(f"layers.{stage}.blocks.{i}", block)
            number += 1


def _block(name, block):
    attention = block.token_mixer
    yield from _norm(f"{name}.norm1", block.attention_norm)
    yield from _norm(f"{name}.norm2", block.feed_forward_norm)
    yield from _dense(f"{name}.attn.qkv", attention.qkv)
    yield from _dense(f"{name}.attn.proj", attention.output_dense)
    yield from _dense(f"{name}.attn.cpb_mlp.0", attention.bias_1)
    yield from _dense(f"{name}.attn.cpb_mlp.2", attention.bias_2)
    layer = block.feed_forward
    if not hasattr(layer, "router"):
        yield from _dense(f"{name}.mlp.fc1", layer.dense_1)
        yield from _dense(f"{name}.mlp.fc2", layer.dense_2)
        return
    name += ".mlp._moe_layer"
    bank, router = layer.experts, layer.router
    name, gate = f"{name}.experts.batched", f"{name}.gates.0."
    yield f"{name}_fc1_w", bank.up_kernel, _swap, _swap
    yield f"{name}_fc2_w", bank.down_kernel, None, None
    yield f"{name}_fc1_bias", bank.up_bias, None, None
    if bank.down_bias is not None:
        yield f"{name}_fc2_bias", bank.down_bias, None, None
    if isinstance(router, CosineRouter):
        projection = f"{gate}cosine_projector"
        yield f"{gate}sim_matrix", router.kernel, None, None
        yield f"{gate}temperature", router.log_scale, None, None
        yield f"{projection}.weight", router.projection_kernel, _swap, _swap
        yield f"{projection}.bias", router.projection_bias, None, None
    else:
        yield f"{gate}wg.weight", router.kernel, _swap, _swap


def _swap(value):
    return np.swapaxes(value, -1, -2)


def _dense(name, layer):
    yield f"{name}.weight", layer.kernel, _swap, _swap
    if layer.bias is not None:
        yield f"{name}.bias", layer.bias, None, None


def _norm(name, layer):
    yield f"{name}.weight", layer.gamma, None, None
    yield f"{name}.bias", layer.beta, None, None


def assign(model, case):
    """Gives a model the recorded weights; all of them have a place."""
    left = case.under("w/")
    config = config_of(case)
    for name, variable, to, _ in places(model, config):
        value = left.pop(name)
        value = value if to is None else to(value)
        variable.assign(value.reshape(variable.shape))
    for name, value in left.items():
        # Without a bias, the original has one of zeros that is not trained.
        if not name.endswith("fc2_bias") or config["mlp_fc2_bias"]:
            raise ValueError(f"The model has no {name}")
        np.testing.assert_array_equal(value, 0.0)


def gradients_by_name(model, case, gradients):
    """Gradients by the names of the original, from those by path."""
    found = {}
    for name, variable, _, back in places(model, config_of(case)):
        gradient = gradients[variable.path]
        found[name] = gradient if back is None else back(gradient)
    return found


class MixedLoadLoss(RoutingLoss):
    """Tutel's load loss, which compares probabilities with a logit.

    Args:
        weight: float.
        top_k: int.
        stddev: float. Of the noise.
        draws: `(T, E)`. The recorded noise, in units of it.
    """

    def __init__(self, weight, top_k, stddev, draws):
        super().__init__(weight)
        self.top_k, self.stddev, self.draws = top_k, stddev, draws

    def call(self, routing, mask=None):
        noisy = ops.add(routing.logits, self.stddev * self.draws)
        best = ops.argsort(-noisy, axis=-1)[:, self.top_k - 1 : self.top_k]
        threshold = ops.take_along_axis(noisy, best, axis=-1)
        clean = ops.softmax(routing.logits)
        scaled = (clean - threshold) / (self.stddev * 2**0.5)
        load = ops.sum(0.5 * (1 + ops.erf(scaled)), axis=0)
        mean = ops.mean(load)
        variance = ops.sum((load - mean) ** 2) / (load.shape[0] - 1)
        return variance / (mean**2 + 1e-10)
