import keras
from keras import ops

from keras_moe.checks import as_units
from keras_moe.ops import activations
from keras_moe.ops.grouped_matmul import batch_matmul
from keras_moe.recommendation.gates import gate_activations
from keras_moe.recommendation.gates import layer_networks
from keras_moe.recommendation.gates import multi_gate_parts as parts
from keras_moe.recommendation.gates import unit_inputs
from keras_moe.recommendation.gates.expert_units import ExpertUnits
from keras_moe.recommendation.gates.task_gates import TaskGates


@keras.saving.register_keras_serializable("keras_moe")
class MultiGateMoE(keras.layers.Layer):
    """One level of experts that several tasks mix, each by a gate of its own.

    ```
    expert[e] = mlp[e](x[slot of e])                        for each expert
    gate[t]   = softmax over the experts t sees of  x[slot of t] @ kernel[t]
    y[t]      = sum over the experts t sees of gate[t][e] * expert[e]
    ```

    The units are the tasks, and one more for the experts they share. Each task
    may have experts of its own, and sees these and the shared ones, or all, or
    those of a matrix. The published models are settings of this layer:

    | model | settings |
    |---|---|
    | MMoE | `num_shared_experts=8` |
    | OMoE | the same with `num_tasks=1`: one gate for all tasks |
    | CGC | `num_task_experts=4, num_shared_experts=4` |
    | PLE | such layers in a row, all but the last with `output_shared=True` |
    | AdaTT | PLE's with `visibility="all", self_residual="weights"` |
    | STEM | `visibility="all", gate_input="slot_plus_shared",
      stop_cross_task_gradients=True`, an embedding a unit |
    | DSelect-k | `gate_activation="dselect_k"` |
    | MMoEEx | a random matrix as `visibility` |
    | HoME | `expert_normalization="batch", expert_activation="silu",
      feature_gate_rank=16, self_residual="gates"`, groups by a matrix |

    Experts are stacked: a variable holds one matrix of all of them. They are
    ordered by task, the shared ones last. A gate has weights only for the
    experts it sees, and is computed in float32.

    Args:
        num_tasks: int. Number of tasks. One is allowed.
        expert_units: int, or a list of ints. Widths of the layers of each
            expert; an empty list makes an expert of its input as it is.
            Defaults to `(16,)`.
        num_shared_experts: int. Experts that no task owns. Defaults to `8`.
        num_task_experts: int, or a list with an int for each task. Experts
            that a task owns; may be 0. Defaults to `0`.
        visibility: `"own_and_shared"`: a task sees its own experts and the
            shared ones. `"all"`: all of them. Or a matrix of zeros and ones,
            `(gates, experts)`, the gate of the shared unit last. Defaults to
            `"own_and_shared"`.
        shared_sees: `"all"` or `"shared"`: what the gate of the shared unit
            sees, unless `visibility` is a matrix. Defaults to `"all"`.
        output_shared: bool. Whether the shared unit has a gate too, and thus an
            output, for the next level. Defaults to `False`.
        expert_slots: List of ints, or `None`. The input slot that each expert
            reads. `None` is the slot of its unit. Defaults to `None`.
        expert_activation: Activation of each layer of the experts. Defaults to
            `"relu"`.
        expert_use_bias: bool. Defaults to `True`.
        expert_normalization: `None`, `"batch"` or `"layer"`, for each expert on
            its own. Defaults to `None`.
        expert_normalization_place: `"before_activation"` or
            `"after_activation"`. Defaults to `"before_activation"`.
        expert_dropout: float. Dropout after each layer of the experts, in
            training. Defaults to `0.0`.
        experts: A layer `(batch, dim) -> (batch, width)` to copy for each
            expert, or a list of layers, instead of the experts that the
            arguments before describe. They run one by one. Defaults to `None`.
        feature_gate_rank: int, or `None`. With it, each expert reads
            `x * 2 sigmoid(x @ down[e] @ up[e])`, where `down` has so many
            columns. Defaults to `None`.
        gate_input: `"slot"`, or `"slot_plus_shared"`: the gate of a task reads
            the sum of its slot and the shared one. Defaults to `"slot"`.
        gate_units: List of ints. Hidden layers of each gate, with ReLU.
            Defaults to `()`, a linear gate.
        gate_use_bias: bool. Whether the last layer of a gate has a bias.
            Defaults to `True`.
        gate_normalization: `None`, or `"batch"`, of the logits. Defaults to
            `None`.
        gate_activation: `"softmax"`, `"sparsemax"`, `"entmax15"`, `"top_k"`
            (softmax over the `gate_top_k` largest logits), `"dselect_k"` (see
            `keras_moe.routers.DSelectKRouter`; it stands for the last layer
            and its bias) or any Keras activation. Defaults to `"softmax"`.
        gate_top_k: int. For `"top_k"` and `"dselect_k"`. Defaults to `2`.
        gate_gamma, gate_entropy_weight, gate_unused_code_weight: floats.
            `gamma`, `entropy_weight` and `unused_code_weight` of `"dselect_k"`.
            Default to `1.0`, `0.0` and `1.0`.
        gate_temperature: float. Divides the logits. Defaults to `1.0`.
        gate_dropout: float. Rate at which, in training, a gate's weights are
            dropped; the others are scaled to the same sum, or, as those of a
            Keras activation may be negative, by `1 / (1 - rate)`. Defaults to
            `0.0`.
        self_residual: `None`; `"weights"`, to add `sum w[e] * expert[e]` over a
            unit's own experts, `w` learned and free of the input (the constant
            1 if each unit has one expert); or `"gates"`, to add the same with
            a second gate, softmax over the own experts, sigmoid of one.
            Defaults to `None`.
        stop_cross_task_gradients: bool. Whether the output of a task sends no
            gradient into the experts of other tasks. Defaults to `False`.
        normalization_epsilon: float. Of all normalizations. Defaults to `1e-3`.
        return_gates: bool. Whether a call returns `(outputs, gates)`. Defaults
            to `False`.
        seed: int, or `None`. Seed of dropout, and of the initial values of
            `"dselect_k"` and of a self residual. Defaults to `None`.
        kernel_initializer, kernel_regularizer: Of each expert. Default to
            `"glorot_uniform"` and `None`.
        gate_initializer, gate_regularizer: Of the gates' kernels. Default to
            `"glorot_uniform"` and `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`, read by all, or
            `(batch, slots, dim)` with a slot for each task and, if there are
            shared experts, a shared output or gates that read it, one for the
            shared unit.
        gate_inputs: Tensor of shape `(batch, dim)` or `(batch, gates, dim)`
            that the gates read instead. Defaults to `None`.
        training: bool. Whether to apply dropout, and to normalize by the batch.

    Input shape:
        `(batch, dim)` or `(batch, slots, dim)`

    Output shape:
        `(batch, num_tasks, width)`, or with `output_shared`
        `(batch, num_tasks + 1, width)`.

    Raises:
        ValueError: If arguments are out of range or do not fit together or the
            inputs, or if a gate sees no expert.

    Example:

    Two levels of PLE:

    >>> level_1 = keras_moe.layers.MultiGateMoE(
    ...     2, [8], num_shared_experts=2, num_task_experts=3, output_shared=True
    ... )
    >>> level_2 = keras_moe.layers.MultiGateMoE(
    ...     2, [4], num_shared_experts=2, num_task_experts=3
    ... )
    >>> x = keras.ops.ones((5, 6))
    >>> tuple(level_2(level_1(x)).shape)
    (5, 2, 4)
    >>> tuple(level_1.gates(x).shape)
    (5, 3, 8)

    Reference:

    - [Ma et al., 2018](https://doi.org/10.1145/3219819.3220007) (MMoE)
    - [Tang et al., 2020](https://doi.org/10.1145/3383313.3412236) (CGC, PLE)
    - [Li et al., 2023](https://arxiv.org/abs/2304.04959) (AdaTT)
    - [Su et al., 2023](https://arxiv.org/abs/2308.13537) (STEM)
    - [Wang et al., 2024](https://arxiv.org/abs/2408.05430) (HoME)
    """

    def __init__(
        self,
        num_tasks,
        expert_units=(16,),
        num_shared_experts=8,
        num_task_experts=0,
        visibility="own_and_shared",
        shared_sees="all",
        output_shared=False,
        expert_slots=None,
        expert_activation="relu",
        expert_use_bias=True,
        expert_normalization=None,
        expert_normalization_place="before_activation",
        expert_dropout=0.0,
        experts=None,
        feature_gate_rank=None,
        gate_input="slot",
        gate_units=(),
        gate_use_bias=True,
        gate_normalization=None,
        gate_activation="softmax",
        gate_top_k=2,
        gate_gamma=1.0,
        gate_entropy_weight=0.0,
        gate_unused_code_weight=1.0,
        gate_temperature=1.0,
        gate_dropout=0.0,
        self_residual=None,
        stop_cross_task_gradients=False,
        normalization_epsilon=1e-3,
        return_gates=False,
        seed=None,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        gate_initializer="glorot_uniform",
        gate_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_tasks = num_tasks
        self.expert_units = as_units("expert_units", expert_units, minimum=0)
        self.num_shared_experts = num_shared_experts
        self.num_task_experts = num_task_experts
        self.shared_sees = shared_sees
        self.output_shared = output_shared
        self.expert_slots = expert_slots
        self.expert_activation = activations.get(expert_activation)
        self.expert_use_bias = expert_use_bias
        self.expert_normalization = expert_normalization
        self.expert_normalization_place = expert_normalization_place
        self.expert_dropout = expert_dropout
        self.feature_gate_rank = feature_gate_rank
        self.gate_input = gate_input
        self.gate_units = as_units("gate_units", gate_units, minimum=0)
        self.gate_use_bias = gate_use_bias
        self.gate_normalization = gate_normalization
        self.gate_activation = gate_activations.get(gate_activation)
        self.gate_top_k = gate_top_k
        self.gate_gamma = gate_gamma
        self.gate_entropy_weight = gate_entropy_weight
        self.gate_unused_code_weight = gate_unused_code_weight
        self.gate_temperature = gate_temperature
        self.gate_dropout = gate_dropout
        self.self_residual = self_residual
        self.stop_cross_task_gradients = stop_cross_task_gradients
        self.normalization_epsilon = normalization_epsilon
        self.return_gates = return_gates
        self.seed = seed
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.gate_initializer = keras.initializers.get(gate_initializer)
        self.gate_regularizer = keras.regularizers.get(gate_regularizer)
        self.units = ExpertUnits(
            num_tasks,
            num_task_experts,
            num_shared_experts,
            visibility,
            shared_sees,
            output_shared,
        )
        if not isinstance(visibility, str):
            visibility = self.units.visible.astype("int32").tolist()
        self.visibility = visibility
        self.num_gates = self.units.num_gates
        self.num_experts = self.units.num_experts
        parts.check_arguments(self)
        self._slots = list(expert_slots or self.units.owners.tolist())
        self.feature_gates = parts.make_feature_gates(self, self._slots)
        self.experts = parts.make_experts(self, experts)
        # A function, since Keras would make the dict one of its own.
        config = None
        if experts is not None:
            config = layer_networks.serialize_experts(experts)
        self._experts_config = lambda: config
        self.task_gates = parts.make_gates(self)
        self.residual = parts.make_residual(self)

    def build(self, inputs_shape, gate_inputs_shape=None):
        unit_inputs.check_shapes(self, inputs_shape, gate_inputs_shape)
        shape = tuple(inputs_shape)
        gate_shape = gate_inputs_shape
        if gate_shape is None:
            gate_shape = shape
            if len(shape) == 3:
                gate_shape = (shape[0], self.num_gates, shape[-1])
        if self.feature_gates is not None:
            self.feature_gates.build(shape)
        if self.experts is not None:
            self.experts.build(self._expert_shape(shape))
        self.task_gates.build(gate_shape)
        if isinstance(self.residual, TaskGates):
            self.residual.build(gate_shape)
        elif self.residual is not None:
            self.residual.build((shape[0], self.num_gates, self.num_experts))

    def _expert_shape(self, shape):
        if self.feature_gates is not None or len(shape) == 3:
            return (shape[0], self.num_experts, shape[-1])
        return shape

    def call(self, inputs, gate_inputs=None, training=None):
        inputs = ops.convert_to_tensor(inputs)
        gate_inputs = self._gate_inputs(inputs, gate_inputs)
        gates = self.task_gates(gate_inputs, training=training)
        weights = gates
        if isinstance(self.residual, TaskGates):
            weights = gates + self.residual(gate_inputs)
        elif self.residual is not None:
            weights = self.residual(gates)
        outputs = self._mix(weights, self._expert_outputs(inputs, training))
        return (outputs, gates) if self.return_gates else outputs

    def gates(self, inputs, gate_inputs=None):
        """The weights of the gates for given inputs, as in inference.

        Args:
            inputs, gate_inputs: As for a call.

        Returns:
            Tensor of shape `(batch, gates, experts)`, zero where a gate does
            not see an expert; without what `self_residual` adds.
        """
        inputs = ops.convert_to_tensor(inputs)
        if not self.built:
            shape = None if gate_inputs is None else gate_inputs.shape
            self.build(inputs.shape, shape)
        return self.task_gates(
            self._gate_inputs(inputs, gate_inputs), training=False
        )

    def _gate_inputs(self, inputs, gate_inputs):
        if gate_inputs is not None:
            return ops.convert_to_tensor(gate_inputs)
        return unit_inputs.gate_slots(
            inputs,
            self.num_tasks,
            self.num_gates,
            self.gate_input == "slot_plus_shared",
        )

    def _expert_outputs(self, inputs, training):
        """`(B, E, O)`."""
        x = ops.cast(inputs, self.compute_dtype)
        if self.feature_gates is not None:
            x = self.feature_gates(x)
        elif self.experts is None:
            x = unit_inputs.one_by_one(x, self._slots)
        else:
            x = unit_inputs.expert_inputs(x, self._slots)
        if self.experts is None:
            return x
        return self.experts(x, training=training)

    def _mix(self, weights, outputs):
        """The sum over the experts, in the dtype of the gates."""
        outputs = ops.cast(outputs, weights.dtype)
        foreign = self.units.foreign
        if self.stop_cross_task_gradients and foreign.any():
            zeros = ops.zeros_like(weights)
            mixed = batch_matmul(ops.where(foreign, zeros, weights), outputs)
            mixed = mixed + batch_matmul(
                ops.where(foreign, weights, zeros), ops.stop_gradient(outputs)
            )
        else:
            mixed = batch_matmul(weights, outputs)
        return ops.cast(mixed, self.compute_dtype)

    def compute_output_shape(self, inputs_shape, gate_inputs_shape=None):
        width = inputs_shape[-1]
        if self.experts is not None:
            shape = self._expert_shape(tuple(inputs_shape))
            width = self.experts.compute_output_shape(shape)[-1]
        shape = (inputs_shape[0], self.num_gates, width)
        if self.return_gates:
            return shape, (inputs_shape[0], self.num_gates, self.num_experts)
        return shape

    def compute_output_spec(self, inputs, gate_inputs=None, training=None):
        shape = self.compute_output_shape(inputs.shape)
        if not self.return_gates:
            return keras.KerasTensor(shape, dtype=self.compute_dtype)
        return (
            keras.KerasTensor(shape[0], dtype=self.compute_dtype),
            keras.KerasTensor(shape[1], dtype=self.task_gates.compute_dtype),
        )

    def get_config(self):
        return {
            **super().get_config(),
            **parts.config_of(self),
            "experts": self._experts_config(),
        }

    @classmethod
    def from_config(cls, config):
        experts = layer_networks.deserialize_experts(config["experts"])
        return super().from_config({**config, "experts": experts})
