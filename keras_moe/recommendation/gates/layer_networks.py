"""Experts of a `MultiGateMoE` that are layers of any kind."""

import keras
from keras import ops

from keras_moe.stacked import layer_copies


class LayerNetworks(keras.layers.Layer):
    """Copies of a layer, or given layers, side by side.

    `(B, D)`, read by all, or `(B, S, D)`, each slot read by `E / S` in a row ->
    `(B, E, O)`.
    """

    def __init__(self, layer, num_networks, **kwargs):
        super().__init__(**kwargs)
        self.num_networks = num_networks
        if isinstance(layer, (list, tuple)):
            self.layers = list(layer)
        else:
            self.layers = layer_copies.make_copies(
                layer, num_networks, self.name
            )

    def build(self, input_shape):
        shapes = []
        for layer in self.layers:
            shape = (input_shape[0], input_shape[-1])
            layer_copies.build(layer, shape, self.compute_dtype)
            shapes.append(
                layer_copies.output_shape(layer, shape, self.compute_dtype)
            )
        if len(set(shapes)) > 1 or len(shapes[0]) != 2:
            raise ValueError(
                "`experts` must all give rows of the same width. Received: "
                f"rows of shape {shape}, output shapes={shapes}"
            )

    def call(self, inputs, training=None):
        inputs = ops.cast(inputs, self.compute_dtype)
        outputs = []
        for number, layer in enumerate(self.layers):
            kwargs = {}
            if layer_copies.takes(layer, "training"):
                kwargs["training"] = training
            x = inputs
            if len(inputs.shape) == 3:
                # As many in a row read a slot as there are too few slots.
                x = inputs[:, number * inputs.shape[1] // self.num_networks]
            outputs.append(ops.cast(layer(x, **kwargs), self.compute_dtype))
        return ops.stack(outputs, axis=1)

    def compute_output_shape(self, input_shape):
        shape = (input_shape[0], input_shape[-1])
        width = layer_copies.output_shape(
            self.layers[0], shape, self.compute_dtype
        )[-1]
        return (input_shape[0], self.num_networks, width)


def check_experts(experts, num_experts):
    """Raises unless it is a layer or a list of `num_experts` layers."""
    layers = experts if isinstance(experts, (list, tuple)) else [experts]
    if not all(isinstance(part, keras.layers.Layer) for part in layers):
        raise ValueError(
            "`experts` must be a layer or a list of layers. "
            f"Received: experts={experts!r}"
        )
    if isinstance(experts, (list, tuple)) and (
        len(layers) != num_experts or len({id(x) for x in layers}) < num_experts
    ):
        raise ValueError(
            f"A list for `experts` must have {num_experts} different layers, "
            "the shared experts last. "
            f"Received: experts={experts!r}"
        )


def serialize_experts(experts):
    if isinstance(experts, (list, tuple)):
        return [layer_copies.config_of(layer) for layer in experts]
    return layer_copies.config_of(experts)


def deserialize_experts(config):
    if isinstance(config, (list, tuple)):
        return [deserialize_experts(part) for part in config]
    if isinstance(config, dict):
        return keras.saving.deserialize_keras_object(config)
    return config
