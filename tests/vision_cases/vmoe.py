"""Models of google-research/vmoe, from public classes."""

import re

import numpy as np

from keras_moe.layers import Capacity
from keras_moe.models import VMoEBackbone
from keras_moe.models import VMoEImageClassifier


def is_image_model(meta, arrays):
    """Whether it is one image tower with a head, not an ensemble."""
    config = meta.get("config", {})
    encoder = config.get("encoder", {})
    return "classifier" in config and "ensemble_size" not in (
        encoder.get("moe") or {}
    )


def router_of(meta):
    return (meta["config"]["encoder"].get("moe") or {}).get("router", {})


def matches(meta, arrays):
    return is_image_model(meta, arrays) and not router_of(meta).get(
        "name", ""
    ).endswith("SoftRouter")


def chooses_tokens(meta):
    """Whether experts choose."""
    return "ItemsPerExpert" in router_of(meta).get("name", "")


def model_from_case(case, loss_weights=None, **changed):
    """A `VMoEImageClassifier` with the weights of the case.

    Args:
        case: A `Case`.
        loss_weights: dict, instead of those of the case.
        **changed: Further arguments of the backbone.
    """
    moe, router = case.config["encoder"].get("moe"), router_of(case.meta)
    options = {"moe_layers": []}
    if moe:
        dispatcher = router["dispatcher"]
        top_k = router.get("num_selected_experts", 1)
        options = {
            "num_experts": moe["num_experts"],
            "moe_layers": moe["layers"],
            "group_size": moe["group_size"],
            "router": "expert_choice" if chooses_tokens(case.meta) else "v_moe",
            "top_k": None if chooses_tokens(case.meta) else top_k,
            "router_noise": router.get("noise_std", 1.0),
            "capacity_factor": dispatcher.get("capacity_factor", 1.0),
            # The same in inference.
            "eval_capacity_factor": None,
            "capacity_multiple_of": dispatcher.get("capacity_multiple_of", 4)
            or 1,
            "drop_policy": "priority"
            if dispatcher.get("batch_priority")
            else "position",
            **loss_arguments(router),
            **(loss_weights or {}),
        }
    backbone = VMoEBackbone(**encoder_arguments(case), **{**options, **changed})
    if moe and not chooses_tokens(case.meta):
        set_sizes(backbone, dispatcher, moe["group_size"] * top_k)
    return classifier(VMoEImageClassifier, backbone, case)


def set_sizes(backbone, dispatcher, choices):
    """Capacities that the backbone has no arguments for."""
    size = dispatcher.get("capacity")
    if dispatcher.get("capacity_ceil_or_round", "ceil") == "round":
        experts = backbone.block(
            backbone.moe_blocks[0]
        ).feed_forward.num_experts
        size = round(choices * dispatcher["capacity_factor"] / experts)
        size += -size % (dispatcher.get("capacity_multiple_of", 4) or 1)
    if size is None:
        return
    for block in backbone.moe_blocks:
        sender = backbone.block(block).feed_forward.dispatcher
        config = sender.capacity.get_config()
        config |= {"capacity_factor": None, "size": size}
        sender.capacity = Capacity.from_config(config)


def loss_arguments(router):
    return {
        "importance_loss_weight": router.get("importance_loss_weight", 1.0),
        "load_loss_weight": router.get("load_loss_weight", 1.0),
        "load_balancing_loss_weight": router.get("gshard_loss_weight", 0.0),
    }


def encoder_arguments(case):
    """What V-MoE and Soft MoE have in common."""
    config, encoder = case.config, case.config["encoder"]
    position = encoder.get("position_emb", {"name": "learned"})["name"]
    return {
        "image_shape": case.arrays["x"].shape[1:],
        "patch_size": config["patch_size"],
        "num_layers": encoder["num_layers"],
        "num_heads": encoder["num_heads"],
        "hidden_dim": config["hidden_size"],
        "mlp_dim": encoder["mlp_dim"],
        "use_class_token": config["classifier"] == "token",
        "positions": position.removesuffix("2d"),
        "qk_norm": encoder.get("attention_qk_norm", False),
        "data_format": "channels_last",
    }


def classifier(make, backbone, case):
    model = make(
        backbone,
        case.config["num_classes"],
        pooling=case.config["classifier"],
        representation_dim=case.config.get("representation_size"),
    )
    assign(model, case.under("w/"))
    return model


# Our names and the original's, tried in this order.
_NAMES = (
    (r"^patch_embedding/projection/", "embedding/"),
    (r"^patch_embedding/class_token", "cls"),
    (r"^patch_embedding/positions", "Encoder/posembed_input/pos_embedding"),
    (r"^block_(\d+)/", r"Encoder/encoderblock_\1/"),
    (r"/attention_norm/", "/LayerNorm_0/"),
    (r"/feed_forward_norm/", "/LayerNorm_1/"),
    (r"^norm/", "Encoder/encoder_norm/"),
    (r"^pooling/attention/", "MapHead/MultiHeadDotProductAttention/"),
    (r"^pooling/norm/", "MapHead/LayerNorm/"),
    (r"^pooling/", "MapHead/"),
    (r"^predictions/", "head/"),
    (r"/attention/", "/SelfAttention/"),
    (r"/attention_output/", "/out/"),
    (r"/(query|key)_norm/", r"/\1_ln/"),
    (r"/mlp/", "/Mlp/"),
    (r"/dense_1/", "/Dense_0/"),
    (r"/dense_2/", "/Dense_1/"),
    (r"/moe/router/slot_kernel$", "/Moe/Router/mu"),
    (r"/moe/router/scale$", "/Moe/Router/scale"),
    (r"/moe/router/kernel$", "/Moe/Router/dense/kernel"),
    (r"/moe/experts/up_", "/Moe/Mlp/Dense_0/"),
    (r"/moe/experts/down_", "/Moe/Mlp/Dense_1/"),
    (r"/gamma$", "/scale"),
    (r"/beta$", "/bias"),
)


def original_name(path):
    for ours, theirs in _NAMES:
        path = re.sub(ours, theirs, path)
    return path


def assign(model, weights):
    """Gives a model the recorded weights; all of them have a place."""
    left = dict(weights)
    for variable in model.trainable_variables:
        value = left.pop(original_name(variable.path))
        variable.assign(value.reshape(variable.shape))
    if left:
        raise ValueError(f"The model has no {sorted(left)}")


def assert_gradients(test, gradients, prefix, case):
    """Compares all recorded gradients of weights, relative to their largest."""
    found = {original_name(path): g for path, g in gradients.items()}
    recorded = case.under(f"{prefix}grad/w/")
    test.assertGreaterEqual(len(recorded), 3)
    for name, wanted in recorded.items():
        with test.subTest(name):
            # A softmax does not see the bias of all keys: without a norm of
            # keys its gradient is zero, but for rounding.
            scale = np.abs(wanted).max()
            if name.endswith("key/bias"):
                scale = max(scale, 1.0)
            actual = found[name].reshape(wanted.shape)
            test.assert_relative(actual / scale, wanted / scale)
