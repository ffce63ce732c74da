import keras
from keras import ops

from keras_moe.checks import check_int
from keras_moe.stacked import layer_copies


@keras.saving.register_keras_serializable("keras_moe")
class LayerNetworks(keras.layers.Layer):
    """Layers of any kind side by side.

    ```
    y[:, n] = layer[n](x[:, slot of n])
    ```

    They serve as experts of a `MultiGateMoE` that are more than a
    `StackedMLP`. They run one after the other; a `StackedMLP` computes all
    networks at once.

    Args:
        layer: A layer `(batch, dim) -> (batch, width)`. It is copied for each
            network, and each copy has its own weights and seeds. Or a list of
            `num_networks` different layers, which are used as they are.
        num_networks: int. Number of networks.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`, read by all networks, or
            `(batch, slots, dim)`, where `num_networks / slots` consecutive
            networks read the same slot.
        training: bool. Passed on to the layers that take it.

    Input shape:
        `(batch, dim)` or `(batch, slots, dim)`

    Output shape:
        `(batch, num_networks, width)`

    Raises:
        ValueError: If `layer` is not a layer or a list of `num_networks`
            different layers; when built, if the widths of their outputs differ.

    Example:

    >>> layer = keras_moe.layers.LayerNetworks(keras.layers.Dense(4), 3)
    >>> tuple(layer(keras.ops.ones((2, 6))).shape)
    (2, 3, 4)
    """

    def __init__(self, layer, num_networks, **kwargs):
        super().__init__(**kwargs)
        check_int("num_networks", num_networks, 1)
        _check_layers(layer, num_networks)
        self.num_networks = num_networks
        given = isinstance(layer, (list, tuple))
        template = None if given else layer_copies.template_of(layer)
        # A function, since Keras wraps dicts that are attributes.
        self._template = lambda: template
        if given:
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
                "The layers must all give rows of the same width. Received: "
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
                x = inputs[:, number * inputs.shape[1] // self.num_networks]
            outputs.append(ops.cast(layer(x, **kwargs), self.compute_dtype))
        return ops.stack(outputs, axis=1)

    def compute_output_shape(self, input_shape):
        shape = (input_shape[0], input_shape[-1])
        width = layer_copies.output_shape(
            self.layers[0], shape, self.compute_dtype
        )[-1]
        return (input_shape[0], self.num_networks, width)

    def get_config(self):
        layer = self._template()
        if layer is None:
            layer = [layer_copies.config_of(part) for part in self.layers]
        return {
            **super().get_config(),
            "layer": layer,
            "num_networks": self.num_networks,
        }

    @classmethod
    def from_config(cls, config):
        return super().from_config(
            {**config, "layer": deserialized_layers(config["layer"])}
        )


def _check_layers(layer, num_networks):
    given = isinstance(layer, (list, tuple))
    layers = layer if given else [layer]
    if not all(isinstance(part, keras.layers.Layer) for part in layers):
        raise ValueError(
            "`layer` must be a layer or a list of layers. "
            f"Received: layer={layer!r}"
        )
    number = len({id(part) for part in layers})
    if given and not number == len(layers) == num_networks:
        raise ValueError(
            f"A list for `layer` must have {num_networks} different layers. "
            f"Received: layer={layer!r}"
        )


def deserialized_layers(config):
    """A layer, or a list of layers, from itself or its config."""
    if isinstance(config, (list, tuple)):
        return [deserialized_layers(part) for part in config]
    if isinstance(config, dict):
        return keras.saving.deserialize_keras_object(config)
    return config
