import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_int
from keras_moe.checks import check_positive
from keras_moe.ops import activations
from keras_moe.stacked.draws import own_draws
from keras_moe.stacked.stacked_dense import StackedDense


@keras.saving.register_keras_serializable("keras_moe")
class GateNU(keras.layers.Layer):
    """Factors between 0 and `scale` from prior information (PEPNet).

    ```
    y = scale * sigmoid(relu(x @ W1 + b1) @ W2 + b2)
    ```

    With a `scale` of 2, the factors are around 1 at the start.

    Args:
        units: int. Number of factors.
        hidden_units: int. Width of the hidden layer. Defaults to `None`,
            `units`.
        scale: float. Largest factor. Defaults to `2.0`.
        activation: Activation of the hidden layer. Defaults to `"relu"`.
        num_gates: int, or `None`. Number of gates side by side, each with its
            own weights. Defaults to `None`: one gate, and no axis for it.
        kernel_initializer: Initializer of the kernels. Defaults to
            `"glorot_uniform"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`; with `num_gates` also
            `(batch, num_gates, dim)`.

    Input shape:
        `(batch, dim)`, or `(batch, num_gates, dim)`

    Output shape:
        `(batch, units)`; with `num_gates` `(batch, num_gates, units)`.

    Raises:
        ValueError: If an argument is out of range, or does not fit the inputs.

    Example:

    >>> gate = keras_moe.layers.GateNU(units=3)
    >>> tuple(gate(keras.ops.ones((2, 5))).shape)
    (2, 3)

    Reference:

    - [Chang et al., 2023](https://arxiv.org/abs/2302.01115)
    """

    def __init__(
        self,
        units,
        hidden_units=None,
        scale=2.0,
        activation="relu",
        num_gates=None,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("units", units, 1)
        if hidden_units is not None:
            check_int("hidden_units", hidden_units, 1)
        if num_gates is not None:
            check_int("num_gates", num_gates, 1)
        check_positive("scale", scale)
        self.units = units
        self.hidden_units = hidden_units
        self.scale = scale
        self.activation = as_keras_object(
            "activation", activations.get, activation
        )
        self.num_gates = num_gates
        self.kernel_initializer = as_keras_object(
            "kernel_initializer", keras.initializers.get, kernel_initializer
        )
        self.hidden = self._dense(
            0, hidden_units or units, self.activation, "hidden"
        )
        self.output_dense = self._dense(1, units, "sigmoid", "output")

    def _dense(self, number, units, activation, name):
        return StackedDense(
            self.num_gates or 1,
            units,
            activation,
            kernel_initializer=own_draws(self.kernel_initializer, number),
            dtype=self.dtype_policy,
            name=name,
        )

    def build(self, input_shape):
        if self.num_gates is None and len(input_shape) != 2:
            raise ValueError(
                "The input of GateNU must be of shape (batch, dim), unless it "
                "has `num_gates`. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        self.hidden.build(input_shape)
        self.output_dense.build(self.hidden.compute_output_shape(input_shape))

    def call(self, inputs):
        y = self.scale * self.output_dense(self.hidden(inputs))
        return ops.squeeze(y, axis=1) if self.num_gates is None else y

    def compute_output_shape(self, input_shape):
        if self.num_gates is None:
            return (input_shape[0], self.units)
        return (input_shape[0], self.num_gates, self.units)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "hidden_units": self.hidden_units,
            "scale": self.scale,
            "activation": activations.serialize(self.activation),
            "num_gates": self.num_gates,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
        }
