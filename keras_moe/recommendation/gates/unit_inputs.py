"""What the experts and the gates of a `MultiGateMoE` read."""

import numpy as np
from keras import ops

from keras_moe.checks import check_one_of
from keras_moe.checks import is_int

GATE_INPUTS = ("slot", "slot_plus_shared")


class UnitInputs:
    """Hands the slots of an input to the experts and the gates.

    An input is `(B, D)`, read by all, or `(B, S, D)`, with a slot for each unit
    or the slots that `expert_slots` names.

    Args:
        units: `ExpertUnits`.
        expert_slots, gate_input: As for `MultiGateMoE`.

    Attributes:
        slots: List of `E` ints. The slot that each expert reads.
    """

    def __init__(self, units, expert_slots, gate_input):
        check_one_of("gate_input", gate_input, GATE_INPUTS)
        _check_expert_slots(expert_slots, units.num_experts)
        self.expert_slots = expert_slots
        self.gate_input = gate_input
        self.num_tasks = units.num_tasks
        self.num_gates = units.num_gates
        self.adds_shared = gate_input == "slot_plus_shared"
        self.slots = units.owners.tolist()
        # Whether there is a slot for each unit, and how many there are.
        reads_shared = units.num_shared_experts > 0 or units.output_shared
        self._num_slots = units.num_tasks + int(
            reads_shared or self.adds_shared
        )
        if expert_slots is not None:
            self.slots = list(expert_slots)

    def get_config(self):
        return {
            "expert_slots": self.expert_slots,
            "gate_input": self.gate_input,
        }

    def of_experts(self, x):
        """What the experts read. Consecutive experts may share a slot.

        Args:
            x: `(B, D)` or `(B, S, D)`.

        Returns:
            `(B, D)`; `(B, S, D)` if the slots are read in order, each by the
            same number of experts; or `(B, E, D)`.
        """
        if len(x.shape) == 2:
            return x
        num_slots = int(x.shape[1])  # a tensor while PyTorch traces
        each, rest = divmod(len(self.slots), num_slots)
        in_order = np.repeat(range(num_slots), each).tolist()
        if not rest and self.slots == in_order:
            return x
        return one_by_one(x, self.slots)

    def of_gates(self, x, gate_inputs=None):
        """What the gates read: `gate_inputs` if given, or slots of the input.

        Args:
            x: `(B, D)` or `(B, S, D)`.
            gate_inputs: `(B, D)`, `(B, G, D)` or `None`.

        Returns:
            `(B, D)` or `(B, G, D)`.
        """
        if gate_inputs is not None:
            return ops.convert_to_tensor(gate_inputs)
        if len(x.shape) == 2:
            return x
        if not self.adds_shared:
            same = x.shape[1] == self.num_gates
            return x if same else x[:, : self.num_gates]
        shared = x[:, self.num_tasks : self.num_tasks + 1]
        tasks = x[:, : self.num_tasks] + shared
        if self.num_gates == self.num_tasks:
            return tasks
        return ops.concatenate([tasks, shared], axis=1)

    def gate_shape(self, inputs_shape, gate_inputs_shape=None):
        """Shape of what the gates read.

        Raises:
            ValueError: If the inputs have a wrong shape.
        """
        shape = tuple(inputs_shape)
        self._check_shape(shape, with_gate_inputs=gate_inputs_shape is not None)
        if gate_inputs_shape is not None:
            self._check_gate_inputs(tuple(gate_inputs_shape))
            return tuple(gate_inputs_shape)
        if len(shape) == 3:
            return (shape[0], self.num_gates, shape[-1])
        return shape

    def _check_shape(self, shape, with_gate_inputs):
        if len(shape) not in (2, 3) or None in shape[1:]:
            raise ValueError(
                "The input of MultiGateMoE must be of shape (batch, dim) or "
                "(batch, slots, dim), static but for the batch. "
                f"Received: inputs_shape={shape}"
            )
        if len(shape) == 2 and self.adds_shared:
            raise ValueError(
                "With gate_input='slot_plus_shared' the input must have slots, "
                f"(batch, slots, dim). Received: inputs_shape={shape}"
            )
        needed = self._num_slots
        if self.expert_slots is not None:
            gates = self.num_tasks + 1 if self.adds_shared else self.num_gates
            needed = max(self.slots) + 1
            needed = needed if with_gate_inputs else max(needed, gates)
        if len(shape) == 3 and shape[1] != needed:
            raise ValueError(
                f"The input must have {needed} slots, or none: one for each "
                "task, and one for the shared unit if there are shared "
                "experts, a shared output, or gates that read it; with "
                "`expert_slots`, one for each slot that it names or a gate "
                "reads. "
                f"Received: inputs_shape={shape}"
            )

    def _check_gate_inputs(self, shape):
        if self.adds_shared:
            raise ValueError(
                "`gate_inputs` can only be given with gate_input='slot'. "
                "Received: gate_input='slot_plus_shared'"
            )
        if (
            len(shape) not in (2, 3)
            or None in shape[1:]
            or (len(shape) == 3 and shape[1] != self.num_gates)
        ):
            raise ValueError(
                "`gate_inputs` must be of shape (batch, dim) or (batch, gates, "
                f"dim), with {self.num_gates} gates. "
                f"Received: gate_inputs_shape={shape}"
            )


def one_by_one(x, slots):
    """`(B, D)` or `(B, S, D)` -> `(B, E, D)`, what each expert reads."""
    if len(x.shape) == 2:
        return ops.repeat(ops.expand_dims(x, 1), len(slots), axis=1)
    # Slices, since the gradient of a gather is a scatter-add.
    parts, start = [], 0
    for stop in range(1, len(slots) + 1):
        slot = slots[start]
        if stop < len(slots) and slots[stop] == slot:
            continue
        part = x[:, slot : slot + 1]
        number = stop - start
        parts.append(ops.repeat(part, number, axis=1) if number > 1 else part)
        start = stop
    return ops.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _check_expert_slots(slots, num_experts):
    if slots is not None and (
        not isinstance(slots, (list, tuple))
        or len(slots) != num_experts
        or not all(is_int(slot) and slot >= 0 for slot in slots)
    ):
        raise ValueError(
            f"`expert_slots` must be a list of {num_experts} ints of at "
            f"least 0, one for each expert. Received: expert_slots={slots!r}"
        )
