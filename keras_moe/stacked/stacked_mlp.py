import keras

from keras_moe.checks import as_keras_object
from keras_moe.checks import as_units
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.ops import activations
from keras_moe.stacked.draws import own_draws
from keras_moe.stacked.draws import own_seed
from keras_moe.stacked.stacked_dense import StackedDense
from keras_moe.stacked.stacked_dense import check_options
from keras_moe.stacked.stacked_dense import check_slots


@keras.saving.register_keras_serializable("keras_moe")
class StackedMLP(keras.layers.Layer):
    """Several feed-forward networks side by side, computed as one.

    ```
    h[:, n] = x[:, n], or x for all n
    for each of `units`:
        h[:, n] = dropout(activation(normalization(dense[n](h[:, n]))))
    y[:, n] = output dense[n](h[:, n])                  with `output_units`
    ```

    It can be the experts of a `MultiGateMoE`, or the towers of several tasks.

    Args:
        num_networks: int. Number of networks.
        units: int, or a list of ints. Widths of the layers of each network. The
            list may be empty if there are `output_units`.
        output_units: int, or `None`. Width of one more layer, without
            activation, normalization and dropout. Defaults to `None`.
        activation: Any Keras activation, for all layers but the output layer.
            Defaults to `"relu"`.
        use_bias: bool. Whether all layers but the output layer have a bias.
            Defaults to `True`.
        output_use_bias: bool. Whether the output layer has a bias. Defaults to
            `True`.
        normalization, normalization_epsilon, normalization_place, dropout,
            seed, kernel_initializer, bias_initializer, kernel_regularizer: As
            for `keras_moe.layers.StackedDense`. Each layer derives its own
            seed.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`, read by all networks, or
            `(batch, slots, dim)`, where `num_networks / slots` consecutive
            networks read the same slot.
        training: bool. Whether to apply dropout, and to normalize by the batch.

    Input shape:
        `(batch, dim)` or `(batch, slots, dim)`

    Output shape:
        `(batch, num_networks, width of the last layer)`

    Weights:
        The weights of one `StackedDense` per layer; `layers` lists the layers.

    Raises:
        ValueError: If an argument is out of range, or does not fit the inputs.

    Example:

    >>> towers = keras_moe.layers.StackedMLP(3, [8, 4], output_units=1)
    >>> tuple(towers(keras.ops.ones((2, 3, 6))).shape)
    (2, 3, 1)
    """

    def __init__(
        self,
        num_networks,
        units,
        output_units=None,
        activation="relu",
        use_bias=True,
        output_use_bias=True,
        normalization=None,
        normalization_epsilon=1e-3,
        normalization_place="before_activation",
        dropout=0.0,
        seed=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("num_networks", num_networks, 1)
        if output_units is not None:
            check_int("output_units", output_units, 1)
        check_options(
            normalization,
            normalization_epsilon,
            normalization_place,
            dropout,
            seed,
        )
        self.num_networks = num_networks
        self.units = as_units("units", units, int(output_units is None))
        self.output_units = output_units
        self.activation = as_keras_object(
            "activation", activations.get, activation
        )
        check_bool("use_bias", use_bias)
        self.use_bias = use_bias
        check_bool("output_use_bias", output_use_bias)
        self.output_use_bias = output_use_bias
        self.normalization = normalization
        self.normalization_epsilon = normalization_epsilon
        self.normalization_place = normalization_place
        self.dropout = dropout
        self.seed = seed
        self.kernel_initializer = as_keras_object(
            "kernel_initializer", keras.initializers.get, kernel_initializer
        )
        self.bias_initializer = as_keras_object(
            "bias_initializer", keras.initializers.get, bias_initializer
        )
        self.kernel_regularizer = as_keras_object(
            "kernel_regularizer", keras.regularizers.get, kernel_regularizer
        )
        self.layers = [
            self._dense(
                number,
                width,
                name=f"dense_{number}",
                activation=self.activation,
                use_bias=use_bias,
                normalization=normalization,
                normalization_epsilon=normalization_epsilon,
                normalization_place=normalization_place,
                dropout=dropout,
                seed=own_seed(seed, number),
            )
            for number, width in enumerate(self.units)
        ]
        if output_units is not None:
            number = len(self.units)
            self.layers.append(
                self._dense(
                    number,
                    output_units,
                    name="output",
                    use_bias=output_use_bias,
                )
            )

    def _dense(self, number, units, **kwargs):
        return StackedDense(
            self.num_networks,
            units,
            kernel_initializer=own_draws(self.kernel_initializer, number),
            bias_initializer=own_draws(self.bias_initializer, number),
            kernel_regularizer=self.kernel_regularizer,
            dtype=self.dtype_policy,
            **kwargs,
        )

    def build(self, input_shape):
        check_slots(self.name, input_shape, self.num_networks)
        self.input_spec = keras.layers.InputSpec(
            ndim=len(input_shape), axes={-1: input_shape[-1]}
        )
        for layer in self.layers:
            layer.build(input_shape)
            input_shape = layer.compute_output_shape(input_shape)

    def call(self, inputs, training=None):
        for layer in self.layers:
            inputs = layer(inputs, training=training)
        return inputs

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.num_networks, self.layers[-1].units)

    def get_config(self):
        return {
            **super().get_config(),
            "num_networks": self.num_networks,
            "units": list(self.units),
            "output_units": self.output_units,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "output_use_bias": self.output_use_bias,
            "normalization": self.normalization,
            "normalization_epsilon": self.normalization_epsilon,
            "normalization_place": self.normalization_place,
            "dropout": self.dropout,
            "seed": self.seed,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
            "kernel_regularizer": keras.regularizers.serialize(
                self.kernel_regularizer
            ),
        }
