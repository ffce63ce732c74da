"""Builds what timm computes with mixed kernels, of Keras' layers and ours.

A case is one `CondConv2d`, or a whole network of the EfficientNet family, which
is a `CondConvBackbone` with a classifier.
"""

import keras
import numpy as np

from keras_moe.layers import CondConv2D
from keras_moe.models import CondConvBackbone
from keras_moe.models import MoEImageClassifier
from tests.recommendation_cases.recorded import Recorded

# Shapes of ours from recorded ones, and back.
KERNEL = (2, 3, 1, 0), (3, 2, 0, 1)
DEPTHWISE = (2, 3, 0, 1), (2, 3, 0, 1)
BANK = (0, 3, 4, 2, 1), (0, 4, 3, 1, 2)


def is_layer(config):
    return {"out_channels", "kernel_size", "num_experts"} <= set(config)


def is_network(config):
    return {"arch", "stem_size", "num_features"} <= set(config)


def matches(config, arrays):
    return is_layer(config) or is_network(config)


def model_from_case(case, arrays):
    """A functional model with the weights of the case, and what it records.

    Returns:
        A model that takes a dict of `x`, images with channels last, and for one
        layer `routing`, and gives a dict of `y` and `route/...`; and a
        `Recorded`.
    """
    config = case["config"]
    recorded = Recorded(arrays)
    channels = arrays["x"].shape[1]
    x = keras.Input((*arrays["x"].shape[2:], channels), name="x")
    if is_layer(config):
        weights = keras.Input(arrays["routing"].shape[1:], name="routing")
        y = one_layer(config, recorded, x, weights)
        return keras.Model({"x": x, "routing": weights}, {"y": y}), recorded
    model, names = classifier(
        config, recorded, case["kernel_shapes"], x.shape[1:]
    )
    outputs = {"y": model(x)}
    backbone = model.backbone
    for number in backbone.moe_blocks:
        block = backbone.block(number)
        read = keras.Model(backbone.inputs, block.input)(x)
        outputs[f"route/{names[number]}/weights"] = Weigher(block)(read)
    return keras.Model({"x": x}, outputs), recorded


def one_layer(config, recorded, x, weights):
    size, stride = config["kernel_size"], config.get("stride", 1)
    dilation = config.get("dilation", 1)
    padding = config.get("padding", "")
    if padding in ("", None):  # timm's own, the same on each side
        padding = [
            (s - 1 + d * (k - 1)) // 2
            for s, d, k in zip(
                *map(_pair, (stride, dilation, size)), strict=True
            )
        ]
    layer = CondConv2D(
        config["out_channels"],
        size,
        config["num_experts"],
        strides=stride,
        padding=padding.lower() if isinstance(padding, str) else padding,
        dilation_rate=dilation,
        groups=config.get("groups", 1),
        use_bias=recorded.has("bias"),
        data_format="channels_last",
    )
    y = layer(x, routing_weights=weights)
    put(recorded, layer.kernel, "kernel", BANK)
    if layer.use_bias:
        recorded.put(layer.bias, "bias")
    return y


def put(recorded, variable, name, layout, shape=None):
    """Puts a recorded weight, perhaps flat, into a variable."""
    to, back = layout
    flat = recorded.weights[name].shape

    def spread(value):
        return value if shape is None else value.reshape(flat[0], *shape)

    recorded.put(
        variable,
        name,
        to=lambda value: np.transpose(spread(value), to),
        back=lambda value: np.transpose(value, back).reshape(flat),
    )


def classifier(config, recorded, kernel_shapes, shape):
    """A `MoEImageClassifier` of a `CondConvBackbone`, and names of its blocks.

    Args:
        config, kernel_shapes: Of the case.
        recorded: A `Recorded`.
        shape: Three ints, of the images.
    """
    weights, blocks, stages = recorded.weights, [], []
    for stage, specs in enumerate(config["arch"]):
        number = 0
        for spec in specs:
            kind, *options = spec.split("_")
            given = {o.rstrip("0123456789."): o for o in options}
            name = f"blocks.{stage}.{number}"
            if len(specs) == 1:  # a network may be deeper than `arch` says
                repeats = recorded.count(f"blocks.{stage}.{{}}")
                given["r"] = f"r{repeats}"
            norm = "bn2" if kind == "ds" else "bn3"
            given["c"] = f"c{len(weights[f'{name}.{norm}.weight'])}"
            if "cc" in given:
                experts = len(weights[f"{name}.routing_fn.bias"])
                given["cc"] = f"cc{experts}"
            stages.append("_".join([kind, *given.values()]))
            for _ in range(int(given["r"][1:])):
                blocks.append((kind, f"blocks.{stage}.{number}"))
                number += 1
    backbone = CondConvBackbone(
        shape,
        stages,
        stem_filters=len(weights["bn1.weight"]),
        head_filters=len(weights["bn2.weight"]),
        activation=config["act"],
        padding="symmetric",
        batch_norm_epsilon=1e-5,
        data_format="channels_last",
    )
    model = MoEImageClassifier(backbone, config["num_classes"])
    put_dense(recorded, model.get_layer("predictions"), "classifier")
    for ours, conv, norm in (
        ("stem", "conv_stem", "bn1"),
        ("head", "conv_head", "bn2"),
    ):
        kernel = backbone.get_layer(ours).kernel
        put(recorded, kernel, f"{conv}.weight", KERNEL)
        put_norm(recorded, backbone.get_layer(f"{ours}_norm"), norm)
    for number, (kind, name) in enumerate(blocks):
        put_block(recorded, backbone.block(number), kind, name, kernel_shapes)
    return model, [name for _, name in blocks]


def put_block(recorded, block, kind, name, kernel_shapes):
    names = {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2")}
    names["project"] = "conv_pwl", "bn3"
    if kind == "ds":
        names = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
    for ours, (conv, norm) in names.items():
        layer, conv = getattr(block, ours), f"{name}.{conv}"
        layout = DEPTHWISE if ours == "depthwise" else KERNEL
        if conv in kernel_shapes:
            layout = BANK
        shape = kernel_shapes.get(conv)
        put(recorded, layer.kernel, f"{conv}.weight", layout, shape)
        put_norm(recorded, getattr(block, f"{ours}_norm"), f"{name}.{norm}")
    if block.squeeze is not None:
        put_dense(recorded, block.squeeze, f"{name}.se.conv_reduce")
        put_dense(recorded, block.excite, f"{name}.se.conv_expand")
    if block.router is not None:
        put_dense(recorded, block.router, f"{name}.routing_fn")


def put_dense(recorded, layer, name):
    """A linear layer, in the original perhaps a convolution of 1 x 1."""
    shape = recorded.weights[f"{name}.weight"].shape
    recorded.put(
        layer.kernel,
        f"{name}.weight",
        to=lambda value: value.reshape(shape[:2]).T,
        back=lambda value: value.T.reshape(shape),
    )
    recorded.put(layer.bias, f"{name}.bias")


def put_norm(recorded, layer, name):
    recorded.put(layer.gamma, f"{name}.weight")
    recorded.put(layer.beta, f"{name}.bias")
    weights = recorded.weights
    layer.moving_mean.assign(weights[f"{name}.running_mean"])
    layer.moving_variance.assign(weights[f"{name}.running_var"])


class Weigher(keras.layers.Layer):
    """The weights of the experts of a block, from what the block reads."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def call(self, inputs, training=None):
        return self.block.routing_weights(inputs, training)


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)
