"""What the experts and the gates of a `MultiGateMoE` read."""

import numpy as np
from keras import ops


def expert_inputs(x, slots):
    """Inputs in which networks in a row share a slot, if there are slots.

    Args:
        x: `(B, D)` or `(B, S, D)`.
        slots: List of `E` ints. The slot that each expert reads.

    Returns:
        `(B, D)`, `(B, S, D)` if each slot has as many experts, all in order, or
        `(B, E, D)`.
    """
    if len(x.shape) == 2:
        return x
    num_slots = int(x.shape[1])  # a tensor while PyTorch traces
    each, rest = divmod(len(slots), num_slots)
    if not rest and list(slots) == np.repeat(range(num_slots), each).tolist():
        return x
    return one_by_one(x, slots)


def one_by_one(x, slots):
    """`(B, E, D)`, what each expert reads."""
    if len(x.shape) == 2:
        return ops.repeat(ops.expand_dims(x, 1), len(slots), axis=1)
    # Slices rather than a gather, whose gradient is a scatter-add.
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


def gate_slots(x, num_tasks, num_gates, plus_shared):
    """`(B, D)` or `(B, S, D)` -> the same or `(B, G, D)`, for the gates."""
    if len(x.shape) == 2:
        return x
    if not plus_shared:
        return x if x.shape[1] == num_gates else x[:, :num_gates]
    shared = x[:, num_tasks : num_tasks + 1]
    tasks = x[:, :num_tasks] + shared
    if num_gates == num_tasks:
        return tasks
    return ops.concatenate([tasks, shared], axis=1)


def check_shapes(layer, inputs_shape, gate_inputs_shape):
    """Raises unless a `MultiGateMoE` can read such inputs."""
    shape = tuple(inputs_shape)
    if len(shape) not in (2, 3) or None in shape[1:]:
        raise ValueError(
            "The input of MultiGateMoE must be of shape (batch, dim) or "
            "(batch, slots, dim), static but for the batch. "
            f"Received: inputs_shape={shape}"
        )
    if len(shape) == 2 and layer.gate_input == "slot_plus_shared":
        raise ValueError(
            "With gate_input='slot_plus_shared' the input must have slots, "
            f"(batch, slots, dim). Received: inputs_shape={shape}"
        )
    if len(shape) == 3:
        _check_slots(layer, shape, gate_inputs_shape)
    if gate_inputs_shape is None:
        return
    if layer.gate_input != "slot":
        raise ValueError(
            "`gate_inputs` can only be given with gate_input='slot'. "
            f"Received: gate_input={layer.gate_input!r}"
        )
    shape = tuple(gate_inputs_shape)
    if (
        len(shape) not in (2, 3)
        or None in shape[1:]
        or (len(shape) == 3 and shape[1] != layer.num_gates)
    ):
        raise ValueError(
            "`gate_inputs` must be of shape (batch, dim) or (batch, gates, "
            f"dim), with {layer.num_gates} gates. "
            f"Received: gate_inputs_shape={shape}"
        )


def _check_slots(layer, shape, gate_inputs_shape):
    needed = layer.num_tasks + int(
        layer.num_shared_experts > 0
        or layer.output_shared
        or layer.gate_input == "slot_plus_shared"
    )
    if layer.expert_slots is not None:
        needed = max(layer.expert_slots) + 1
        if gate_inputs_shape is None:
            plus = layer.gate_input == "slot_plus_shared"
            gates = layer.num_tasks + 1 if plus else layer.num_gates
            needed = max(needed, gates)
    if shape[1] != needed:
        raise ValueError(
            f"The input must have {needed} slots, or none: one for each task, "
            "and one for the shared unit if there are shared experts, a "
            "shared output, or gates that read it; with `expert_slots` those "
            f"that these and the gates need. Received: inputs_shape={shape}"
        )
