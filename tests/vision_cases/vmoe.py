"""Models of google-research/vmoe, from public classes."""

import re

import numpy as np

from keras_moe.layers import Capacity
from keras_moe.models import VMoEBackbone
from keras_moe.models import VMoEImageClassifier
from tests.routing_cases.cases import combine_matrix


def is_image_model(meta, arrays):
    """Whether it is one image tower with a head."""
    config = meta.get("config", {})
    return "classifier" in config and "encoder" in config


def members_of(meta):
    """The size of the ensemble, 1 without one."""
    moe = meta["config"]["encoder"].get("moe") or {}
    return moe.get("ensemble_size") or 1


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
            "ensemble_size": members_of(case.meta),
            **loss_arguments(router),
            **(loss_weights or {}),
        }
    backbone = VMoEBackbone(**encoder_arguments(case), **{**options, **changed})
    if moe and not chooses_tokens(case.meta):
        choices = moe["group_size"] * top_k
        set_sizes(backbone, dispatcher, choices / moe["num_experts"])
    return classifier(VMoEImageClassifier, backbone, case)


def set_sizes(backbone, dispatcher, share):
    """Capacities that the backbone has no arguments for."""
    size = dispatcher.get("capacity")
    if dispatcher.get("capacity_ceil_or_round", "ceil") == "round":
        size = round(share * dispatcher["capacity_factor"])
        size += -size % (dispatcher.get("capacity_multiple_of", 4) or 1)
    if size is None:
        return
    for block in backbone.moe_blocks:
        for layer in backbone.block(block).members:
            sender = layer.dispatcher
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
    (r"/moe_\d+/", "/moe/"),
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


def own_part(path, shape, value):
    """What a recorded array has for a variable, of a member or of all."""
    member = re.search(r"/moe_(\d+)/(router|experts)/", path)
    if member is None:
        return value.reshape(shape)
    number = int(member[1])
    if member[2] == "router":  # (D, M, E / M)
        return value[:, number]
    experts = shape[0]  # of (E, ...)
    return value[number * experts : (number + 1) * experts]


def assign(model, weights):
    """Gives a model the recorded weights; all of them have a place."""
    used = set()
    for variable in model.trainable_variables:
        name = original_name(variable.path)
        value = own_part(variable.path, variable.shape, weights[name])
        variable.assign(value)
        used.add(name)
    if used != set(weights):
        raise ValueError(f"The model has no {set(weights) - used}")


def assert_gradients(test, gradients, prefix, case):
    """Compares all recorded gradients of weights, relative to their largest."""
    recorded = case.under(f"{prefix}grad/w/")
    test.assertGreaterEqual(len(recorded), 3)
    compared = set()
    for path, actual in gradients.items():
        name = original_name(path)
        if name not in recorded:
            continue
        compared.add(name)
        wanted = recorded[name]
        with test.subTest(path):
            # A softmax does not see the bias of all keys: without a norm of
            # keys its gradient is zero, but for rounding.
            scale = np.abs(wanted).max()
            if name.endswith("key/bias"):
                scale = max(scale, 1.0)
            wanted = own_part(path, actual.shape, wanted)
            test.assert_relative(actual / scale, wanted / scale)
    test.assertEqual(compared, set(recorded))


def assert_routing(test, case, where, routed):
    """`slot` is a place in a queue, here a row of a sorted batch.

    Which tokens have one is compared, not which. With an ensemble, groups
    are in the order of image, token and member, and a member has the
    experts from `member * E / M` on.
    """
    recorded = case.under(where)
    if not recorded:
        return
    groups, size, experts = recorded["combine"].shape
    members = len(routed)
    own = experts // members
    shape = (groups, size // members, members, members, own)
    combine = np.zeros(shape, "float32")
    for m, (layer, _, routing) in enumerate(routed):
        if "logits" in recorded:
            test.assert_relative(
                routing.logits, recorded["logits"].reshape(-1, experts)
            )
        matrix = combine_matrix(layer, routing, groups, training=True)
        combine[:, :, m, m] = matrix.reshape(groups, -1, own)
        if not chooses_tokens(case.meta):
            rows = layer.capacity.rows_per_expert(
                size // members, own, routing.expert_indices.shape[-1], True
            )
            test.assertEqual(rows, recorded["capacity"])
    combine = combine.reshape(groups, size, experts)
    test.assert_relative(combine, recorded["combine"])
    test.assertAllEqual(combine > 0, recorded["slot"] >= 0)
