"""Builds what timm computes with mixed kernels, of Keras' layers and ours.

A case is one `CondConv2d`, or a whole network of the EfficientNet family whose
blocks with `cc` have one router for all three convolutions.
"""

import keras
import numpy as np
from keras import ops

from keras_moe.layers import CondConv2D
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
    network = Network(config, recorded, case["kernel_shapes"])
    outputs = network(x)
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


class Network:
    """An EfficientNet, as `arch` and the recorded weights describe it."""

    def __init__(self, config, recorded, kernel_shapes):
        self.config = config
        self.recorded = recorded
        self.kernel_shapes = kernel_shapes

    def __call__(self, x):
        found = {}
        x = self.norm(self.conv(x, "conv_stem", stride=2), "bn1")
        for stage, specs in enumerate(self.config["arch"]):
            specs = [spec.split("_") for spec in specs]
            number = 0
            for kind, *options in specs:
                repeats, stride = (
                    next(int(o[1:]) for o in options if o[0] == letter)
                    for letter in "rs"
                )
                has_experts = any(o[:2] == "cc" for o in options)
                for repeat in range(repeats):
                    name = f"blocks.{stage}.{number}"
                    x, weights = self.block(
                        x,
                        name,
                        kind,
                        1 if repeat else stride,
                        has_experts,
                    )
                    if has_experts:
                        found[f"route/{name}/weights"] = weights
                    number += 1
        x = self.norm(self.conv(x, "conv_head"), "bn2")
        x = keras.layers.GlobalAveragePooling2D(data_format="channels_last")(x)
        return {"y": self.recorded.dense(x, "classifier"), **found}

    def block(self, x, name, kind, stride, has_experts):
        before, weights = x, None
        if has_experts:
            pooled = keras.layers.GlobalAveragePooling2D(
                data_format="channels_last"
            )(x)
            logits = self.recorded.dense(pooled, f"{name}.routing_fn")
            weights = ops.sigmoid(logits)

        def conv(x, part, stride=1):
            return self.conv(x, f"{name}.{part}", stride, weights)

        if kind == "ds":
            x = self.norm(conv(x, "conv_dw", stride), f"{name}.bn1")
            x = self.squeeze(x, f"{name}.se")
            x = self.norm(conv(x, "conv_pw"), f"{name}.bn2", activates=False)
        else:
            x = self.norm(conv(x, "conv_pw"), f"{name}.bn1")
            x = self.norm(conv(x, "conv_dw", stride), f"{name}.bn2")
            x = self.squeeze(x, f"{name}.se")
            x = self.norm(conv(x, "conv_pwl"), f"{name}.bn3", activates=False)
        return (x + before if x.shape == before.shape else x), weights

    def conv(self, x, name, stride=1, weights=None):
        """A recorded convolution, with mixed kernels if there are weights."""
        key = f"{name}.weight"
        shape = self.recorded.weights[key].shape
        if name in self.kernel_shapes:
            experts, shape = shape[0], self.kernel_shapes[name]
        filters, c, size, _ = shape
        groups = x.shape[-1] // c
        padding = (stride - 1 + size - 1) // 2
        options = {
            "kernel_size": size,
            "strides": stride,
            "use_bias": f"{name}.bias" in self.recorded.weights,
            "data_format": "channels_last",
        }
        if name in self.kernel_shapes:
            layer = CondConv2D(
                filters,
                num_experts=experts,
                groups=groups,
                padding=padding,
                **options,
            )
            y = layer(x, routing_weights=weights)
            put(self.recorded, layer.kernel, key, BANK, shape)
            return y
        if padding:
            x = keras.layers.ZeroPadding2D(
                padding, data_format="channels_last"
            )(x)
        if groups > 1:
            layer, layout = keras.layers.DepthwiseConv2D(**options), DEPTHWISE
        else:
            layer, layout = keras.layers.Conv2D(filters, **options), KERNEL
        y = layer(x)
        put(self.recorded, layer.kernel, key, layout)
        if layer.use_bias:
            self.recorded.put(layer.bias, f"{name}.bias")
        return y

    def norm(self, x, name, activates=True):
        layer = keras.layers.BatchNormalization(axis=-1, epsilon=1e-5)
        x = layer(x)
        self.recorded.put(layer.gamma, f"{name}.weight")
        self.recorded.put(layer.beta, f"{name}.bias")
        weights = self.recorded.weights
        layer.moving_mean.assign(weights[f"{name}.running_mean"])
        layer.moving_variance.assign(weights[f"{name}.running_var"])
        if not activates:
            return x
        return keras.layers.Activation(self.config["act"])(x)

    def squeeze(self, x, name):
        if not self.recorded.has(name):
            return x
        mean = keras.layers.GlobalAveragePooling2D(
            data_format="channels_last", keepdims=True
        )(x)
        hidden = self.conv(mean, f"{name}.conv_reduce")
        hidden = keras.layers.Activation(self.config["act"])(hidden)
        return x * ops.sigmoid(self.conv(hidden, f"{name}.conv_expand"))


def _pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)
