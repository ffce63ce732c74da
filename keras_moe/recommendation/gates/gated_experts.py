"""From the parts of a `MultiGateMoE` to its outputs."""

import keras
from keras import ops

from keras_moe.recommendation.gates.gate_activations import mix
from keras_moe.recommendation.gates.unit_inputs import one_by_one


class GatedExperts(keras.layers.Layer):
    """Experts that several gates mix.

    A subclass makes the parts.

    Attributes:
        units: `ExpertUnits`. Who owns the experts, and which gate sees them.
        unit_inputs: `UnitInputs`. What experts and gates read.
        feature_gates: Layer that gates what each expert reads, or `None`.
        experts: Layer of all experts, or `None` for experts that return their
            input unchanged.
        task_gates: `TaskGates`.
        residual: Layer that adds to the weights of the gates, or `None`.
        return_gates: bool. Whether to return `(outputs, gates)`.
    """

    def build(self, inputs_shape, gate_inputs_shape=None):
        shape = tuple(inputs_shape)
        gate_shape = self.unit_inputs.gate_shape(shape, gate_inputs_shape)
        if self.feature_gates is not None:
            self.feature_gates.build(shape)
        if self.experts is not None:
            self.experts.build(self._expert_shape(shape))
        self.task_gates.build(gate_shape)
        if self.residual is not None:
            self.residual.build(gate_shape)

    def _expert_shape(self, shape):
        if self.feature_gates is not None or len(shape) == 3:
            return (shape[0], self.units.num_experts, shape[-1])
        return shape

    def call(self, inputs, gate_inputs=None, training=None):
        inputs = ops.convert_to_tensor(inputs)
        gate_inputs = self.unit_inputs.of_gates(inputs, gate_inputs)
        gates = self.task_gates(gate_inputs, training=training)
        weights = gates
        if self.residual is not None:
            weights = gates + self.residual(gate_inputs)
        outputs = mix(
            weights, self._expert_outputs(inputs, training), self.units.stopped
        )
        outputs = ops.cast(outputs, self.compute_dtype)
        return (outputs, gates) if self.return_gates else outputs

    def gates(self, inputs, gate_inputs=None):
        """The weights of the gates in inference, without a self residual.

        Args:
            inputs, gate_inputs: As for a call.

        Returns:
            Tensor of shape `(batch, gates, experts)`, 0 where a gate does not
            see an expert.
        """
        inputs = ops.convert_to_tensor(inputs)
        if not self.built:
            shape = None if gate_inputs is None else gate_inputs.shape
            self.build(inputs.shape, shape)
        return self.task_gates(
            self.unit_inputs.of_gates(inputs, gate_inputs), training=False
        )

    def _expert_outputs(self, inputs, training):
        """`(B, E, O)`."""
        x = ops.cast(inputs, self.compute_dtype)
        if self.feature_gates is not None:
            x = self.feature_gates(x)
        elif self.experts is None:
            x = one_by_one(x, self.unit_inputs.slots)
        else:
            x = self.unit_inputs.of_experts(x)
        return x if self.experts is None else self.experts(x, training=training)

    def compute_output_shape(self, inputs_shape, gate_inputs_shape=None):
        width = inputs_shape[-1]
        if self.experts is not None:
            shape = self._expert_shape(tuple(inputs_shape))
            width = self.experts.compute_output_shape(shape)[-1]
        shape = (inputs_shape[0], self.units.num_gates, width)
        if self.return_gates:
            return shape, (*shape[:2], self.units.num_experts)
        return shape

    def compute_output_spec(self, inputs, gate_inputs=None, training=None):
        shape = self.compute_output_shape(inputs.shape)
        outputs = keras.KerasTensor(
            shape[0] if self.return_gates else shape, self.compute_dtype
        )
        if not self.return_gates:
            return outputs
        gates = keras.KerasTensor(shape[1], self.task_gates.compute_dtype)
        return outputs, gates
