import keras

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_bool
from keras_moe.checks import check_seed
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.recommendation.gates import multi_gate_parts as parts
from keras_moe.recommendation.gates.expert_units import ExpertUnits
from keras_moe.recommendation.gates.gated_experts import GatedExperts
from keras_moe.recommendation.gates.layer_networks import deserialized_layers
from keras_moe.recommendation.gates.self_residual import make_residual
from keras_moe.recommendation.gates.unit_inputs import UnitInputs


@keras.saving.register_keras_serializable("keras_moe")
class MultiGateMoE(GatedExperts):
    """One level of experts that several tasks mix, each with its own gate.

    ```
    expert[e] = mlp[e](x[slot of e])                        for each expert
    gate[t]   = softmax over the experts t sees of  x[slot of t] @ kernel[t]
    y[t]      = sum over the experts t sees of gate[t][e] * expert[e]
    ```

    The units are the tasks, and one more for the experts they share. A task may
    own experts. It sees its own experts and the shared ones, all experts, or
    the experts that a matrix names. Published models are settings of the layer:

    | model | settings |
    |---|---|
    | MMoE | `num_shared_experts=8` |
    | OMoE | MMoE's with `num_tasks=1`: one gate for all tasks |
    | CGC | `num_task_experts=4, num_shared_experts=4` |
    | PLE | CGC layers in a row, all but the last with `output_shared=True` |
    | AdaTT | PLE's with `visibility="all", self_residual="weights"` |
    | STEM | `visibility="all", gate_input="slot_plus_shared",
      stop_cross_task_gradients=True`, and one embedding per unit |
    | DSelect-k | `gate_activation="dselect_k"` |
    | MMoEEx | a random matrix as `visibility` |
    | HoME | `expert_normalization="batch", expert_activation="silu",
      feature_gate_rank=16, self_residual="gates"`, groups by a matrix |

    The experts are ordered by the task that owns them, the shared ones last.
    Experts and gates are objects, or flat arguments with a prefix:

    | part | flat arguments |
    |---|---|
    | `experts`, a `StackedMLP` | `expert_` + `units`, `activation`, `use_bias`,
      `normalization`, `normalization_place`, `dropout`; `kernel_initializer`,
      `kernel_regularizer` |
    | `gates`, a `TaskGates` | `gate_` + `units`, `use_bias`, `normalization`,
      `activation`, `top_k`, `gamma`, `entropy_weight`, `unused_code_weight`,
      `temperature`, `dropout`, `initializer`, `regularizer` |
    | both | `normalization_epsilon`, `seed` |

    Args:
        num_tasks: int. Number of tasks. One is allowed.
        expert_units: int, or a list of ints. Widths of the layers of each
            expert; an empty list makes an expert of its input as it is.
            Defaults to `(16,)`.
        num_shared_experts: int. Experts that no task owns. Defaults to `8`.
        num_task_experts: int, or a list with an int for each task. Number of
            experts that each task owns. Defaults to `0`.
        visibility: `"own_and_shared"`: a task sees its own experts and the
            shared ones. `"all"`: it sees all experts. Or a matrix of zeros and
            ones, `(gates, experts)`, the gate of the shared unit last. Defaults
            to `"own_and_shared"`.
        shared_sees: `"all"` or `"shared"`: what the gate of the shared unit
            sees, unless `visibility` is a matrix. Defaults to `"all"`.
        output_shared: bool. Whether the shared unit has a gate and an output
            too, for the next level. Defaults to `False`.
        expert_slots: List of ints. The input slot that each expert reads.
            Defaults to `None`, the slot of its unit.
        experts: A `keras_moe.layers.StackedMLP`, or another layer with an
            attribute `num_networks`; or a layer `(batch, dim) -> (batch,
            width)` to copy for each expert, or a list of layers. Defaults to
            `None`: the flat arguments describe the experts.
        gates: A `keras_moe.layers.TaskGates`. Defaults to `None`: the flat
            arguments describe the gates.
        feature_gate_rank: int, or `None`. Number of columns of `down`, if each
            expert reads `x * 2 sigmoid(x @ down[e] @ up[e])`. Defaults to
            `None`: it reads `x`.
        gate_input: `"slot"`, or `"slot_plus_shared"`: a task's gate reads the
            sum of its slot and the shared one. Defaults to `"slot"`.
        self_residual: `"weights"` adds `sum w[e] * expert[e]` over a unit's
            own experts, where `w` is learned and independent of the input (and
            the constant 1 if each unit has one expert). With `"gates"`, `w`
            comes from a second gate, a softmax over the unit's own experts, or
            a sigmoid if it has one. Defaults to `None`, no residual.
        stop_cross_task_gradients: bool. Whether to stop the gradients from a
            task's output to the experts of other tasks. Defaults to `False`.
        return_gates: bool. Whether to return `(outputs, gates)`. Defaults to
            `False`.
        seed: int, or `None`. Seed of the parts made from flat arguments and of
            the self residual. Defaults to `None`.
        kernel_initializer: Initializer of experts made from flat arguments and
            of the gates on features. Defaults to `"glorot_uniform"`.
        **kwargs: The other flat arguments, and arguments of a Keras layer.

    Call arguments:
        inputs: Tensor of shape `(batch, dim)`, read by all, or `(batch, slots,
            dim)` with a slot for each task and, if there are shared experts, a
            shared output or gates that read it, one for the shared unit.
        gate_inputs: Tensor of shape `(batch, dim)` or `(batch, gates, dim)`
            that the gates read instead of the inputs. Defaults to `None`.
        training: bool. Whether to apply dropout, and to normalize by the batch.

    Input shape:
        `(batch, dim)` or `(batch, slots, dim)`

    Output shape:
        `(batch, num_tasks, width)`, or with `output_shared`
        `(batch, num_tasks + 1, width)`.

    Raises:
        ValueError: If arguments are out of range, or do not fit together or
            the inputs, or if a gate sees no expert.

    Example:

    Two levels of PLE:

    >>> units = {"num_shared_experts": 2, "num_task_experts": 3}
    >>> level_1 = keras_moe.layers.MultiGateMoE(
    ...     2, [8], **units, output_shared=True)
    >>> level_2 = keras_moe.layers.MultiGateMoE(2, [4], **units)
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
        *,
        experts=None,
        gates=None,
        feature_gate_rank=None,
        gate_input="slot",
        self_residual=None,
        stop_cross_task_gradients=False,
        return_gates=False,
        seed=None,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        flat, kwargs = parts.split(kwargs)
        super().__init__(**kwargs)
        check_bool("return_gates", return_gates)
        check_seed("seed", seed)
        self.units = ExpertUnits(
            num_tasks,
            num_shared_experts,
            num_task_experts,
            visibility,
            shared_sees,
            output_shared,
            stop_cross_task_gradients,
        )
        self.unit_inputs = UnitInputs(self.units, expert_slots, gate_input)
        self.num_tasks = num_tasks
        self.num_gates = self.units.num_gates
        self.num_experts = self.units.num_experts
        self.visibility = self.units.visibility
        self.feature_gate_rank = feature_gate_rank
        self.self_residual = self_residual
        self.return_gates = return_gates
        self.seed = seed
        initializer = as_keras_object(
            "kernel_initializer", keras.initializers.get, kernel_initializer
        )
        self.kernel_initializer = initializer
        policy = self.dtype_policy
        # The order of the parts is the order of the variables in saved
        # optimizers.
        self.feature_gates = parts.feature_gates_of(
            feature_gate_rank, self.unit_inputs.slots, initializer, policy
        )
        flat["expert_units"] = expert_units
        self.experts = parts.experts_of(
            experts, flat, self.num_experts, initializer, seed, policy
        )
        self.task_gates = parts.gates_of(
            gates, flat, self.units.visible, seed, policy
        )
        self.residual = make_residual(
            self_residual, self.units, self.task_gates, seed, policy
        )

    def get_config(self):
        config = {
            **super().get_config(),
            **self.units.get_config(),
            **self.unit_inputs.get_config(),
            "experts": serialize_part(self.experts),
            "gates": serialize_part(self.task_gates),
            "feature_gate_rank": self.feature_gate_rank,
            "self_residual": self.self_residual,
            "return_gates": self.return_gates,
            "seed": self.seed,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
        }
        if self.experts is None:
            config["expert_units"] = []
        return config

    @classmethod
    def from_config(cls, config):
        parts = {
            name: deserialized_layers(config.get(name))
            for name in ("experts", "gates")
        }
        return super().from_config({**config, **parts})
