import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import as_units
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.ops import activations
from keras_moe.recommendation.layers.epnet import check_pair
from keras_moe.recommendation.layers.gate_nu import GateNU
from keras_moe.stacked.stacked_dense import NORMALIZATIONS
from keras_moe.stacked.stacked_dense import StackedDense


@keras.saving.register_keras_serializable("keras_moe")
class PPNet(keras.layers.Layer):
    """Towers of several tasks, with units scaled by user and item (PEPNet).

    ```
    known = concatenate([prior, stop_gradient(x)])
    for each layer l of the tower of task t:        h = x at first
        h = activation(normalization(dense[t, l](h))) * gate[t, l](known)
    y[t]  = output dense[t](h)                      with `output_units`
    ```

    where each `gate` is a `GateNU`. `prior` describes the user, the item and
    its author.

    Args:
        num_tasks: int. Number of towers. Each has its own weights and gates.
        units: int, or a list of ints. Widths of the layers of a tower.
        output_units: int, or `None`. Width of one more layer, without
            activation, and gated only with `gate_place="input"`. Defaults to
            `None`.
        gate_units: int. Width of the hidden layer of each gate. Defaults to
            `None`, the width of the tensor that is gated.
        gate_place: `"output"`: the gates scale the output of each layer, as
            above. `"input"`: they scale its input, the output layer's too.
            Defaults to `"output"`.
        gate_reads: `"prior_and_inputs"`, as above, or `"prior"` alone. Defaults
            to `"prior_and_inputs"`.
        scale: float. Largest factor. Defaults to `2.0`.
        activation: Activation of the towers. Defaults to `"relu"`.
        normalization: `None`, `"batch"` or `"layer"`. Normalization before the
            activation. Defaults to `None`.
        normalization_epsilon: float. Added to the variances. Defaults to
            `1e-3`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`, which all towers read.
        prior: Tensor of shape `(batch, prior dim)`.
        training: bool. Whether to normalize by the batch.

    Input shape:
        `(batch, dim)`

    Output shape:
        `(batch, num_tasks, width of the last layer)`

    Raises:
        ValueError: If an argument is out of range, or shapes are not of rank 2.

    Example:

    >>> layer = keras_moe.layers.PPNet(2, [8, 4])
    >>> x, prior = keras.ops.ones((3, 5)), keras.ops.ones((3, 6))
    >>> tuple(layer(x, prior).shape)
    (3, 2, 4)

    Reference:

    - [Chang et al., 2023](https://arxiv.org/abs/2302.01115)
    """

    def __init__(
        self,
        num_tasks,
        units,
        output_units=None,
        gate_units=None,
        gate_place="output",
        gate_reads="prior_and_inputs",
        scale=2.0,
        activation="relu",
        normalization=None,
        normalization_epsilon=1e-3,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("num_tasks", num_tasks, 1)
        for name, value in (
            ("output_units", output_units),
            ("gate_units", gate_units),
        ):
            if value is not None:
                check_int(name, value, 1)
        check_one_of("gate_place", gate_place, ("output", "input"))
        check_one_of("gate_reads", gate_reads, ("prior_and_inputs", "prior"))
        check_one_of("normalization", normalization, NORMALIZATIONS)
        check_positive("scale", scale)
        check_positive("normalization_epsilon", normalization_epsilon)
        self.num_tasks = num_tasks
        self.units = as_units("units", units)
        self.output_units = output_units
        self.gate_units = gate_units
        self.gate_place = gate_place
        self.gate_reads = gate_reads
        self.scale = scale
        self.activation = as_keras_object(
            "activation", activations.get, activation
        )
        self.normalization = normalization
        self.normalization_epsilon = normalization_epsilon

    def build(self, inputs_shape, prior_shape):
        check_pair("PPNet", "prior", inputs_shape, prior_shape)
        dim = inputs_shape[-1]
        known = prior_shape[-1]
        if self.gate_reads == "prior_and_inputs":
            known += dim
        self.layers, self.gates = [], []
        for number, width in enumerate(self.units):
            self.layers.append(
                StackedDense(
                    self.num_tasks,
                    width,
                    self.activation,
                    normalization=self.normalization,
                    normalization_epsilon=self.normalization_epsilon,
                    dtype=self.dtype_policy,
                    name=f"dense_{number}",
                )
            )
        if self.output_units is not None:
            self.layers.append(
                StackedDense(
                    self.num_tasks,
                    self.output_units,
                    dtype=self.dtype_policy,
                    name="output",
                )
            )
        at_input = self.gate_place == "input"
        # The gates, and so gated inputs, differ between tasks.
        shape = (None, self.num_tasks, dim) if at_input else (None, dim)
        for number, layer in enumerate(self.layers):
            layer.build(shape)
            if at_input or number < len(self.units):
                gate = GateNU(
                    shape[-1] if at_input else layer.units,
                    self.gate_units,
                    self.scale,
                    num_gates=self.num_tasks,
                    dtype=self.dtype_policy,
                    name=f"gate_{number}",
                )
                gate.build((None, known))
                self.gates.append(gate)
            shape = layer.compute_output_shape(shape)

    def call(self, inputs, prior, training=None):
        factors = self.factors(inputs, prior)
        factors += [None] * (len(self.layers) - len(factors))
        h = inputs
        for layer, factor in zip(self.layers, factors, strict=True):
            if self.gate_place == "input":
                if len(h.shape) == 2:
                    h = ops.expand_dims(h, 1)
                h = layer(h * factor, training=training)
            else:
                h = layer(h, training=training)
                h = h if factor is None else h * factor
        return h

    def factors(self, inputs, prior):
        """The factors of the gated layers.

        Args:
            inputs, prior: As for a call.

        Returns:
            List of tensors `(batch, num_tasks, width)`, one per gated layer.
        """
        if not self.built:
            self.build(inputs.shape, prior.shape)
        known = prior
        if self.gate_reads == "prior_and_inputs":
            inputs = ops.stop_gradient(ops.convert_to_tensor(inputs))
            known = ops.concatenate([prior, inputs], axis=-1)
        return [gate(known) for gate in self.gates]

    def compute_output_shape(self, inputs_shape, prior_shape):
        width = self.output_units or self.units[-1]
        return (inputs_shape[0], self.num_tasks, width)

    def get_config(self):
        return {
            **super().get_config(),
            "num_tasks": self.num_tasks,
            "units": list(self.units),
            "output_units": self.output_units,
            "gate_units": self.gate_units,
            "gate_place": self.gate_place,
            "gate_reads": self.gate_reads,
            "scale": self.scale,
            "activation": activations.serialize(self.activation),
            "normalization": self.normalization,
            "normalization_epsilon": self.normalization_epsilon,
        }
