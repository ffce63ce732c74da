"""What shared experts make of all tokens, and how it joins the routed part."""

import keras
from keras import ops

from keras_moe.experts import Experts
from keras_moe.moe.tokens import call_masked
from keras_moe.ops.masking import zero_masked

SHARED_EXPERTS_MODES = ("add", "gate", "average", "residual")


def shared_output(shared_experts, tokens, mask, training):
    """`(T, D)` -> `(T, D')`. The experts of a bank are summed."""
    if not isinstance(shared_experts, Experts):
        return call_masked(shared_experts, tokens, mask)
    copies = shared_experts.num_experts
    num_tokens = ops.shape(tokens)[0]
    rows = shared_experts(
        ops.tile(tokens, (copies,) + (1,) * (len(tokens.shape) - 1)),
        ops.zeros((copies,), "int32") + num_tokens,
        training=training,
    )
    rows = ops.reshape(rows, (copies, num_tokens, *ops.shape(rows)[1:]))
    return ops.sum(rows, axis=0)


def add_shared_gate(layer, dim):
    """The weights that the modes `"gate"` and `"residual"` need."""
    width = {"gate": 1, "residual": 2}.get(layer.shared_experts_mode)
    if width is None:
        return None
    return layer.add_weight(
        name="shared_gate_kernel",
        shape=(dim, width),
        initializer="glorot_uniform",
    )


def join(layer, routed, tokens, features, mask, training):
    """Routed and shared outputs as one; `features` `(T, D)` make the gate."""
    shared = shared_output(layer.shared_experts, tokens, mask, training)
    if len(shared.shape) != len(routed.shape) or (
        shared.shape[-1] != routed.shape[-1]
    ):
        raise ValueError(
            "`shared_experts` must return what the experts return. Received "
            f"shape {tuple(shared.shape)} for {tuple(routed.shape)}"
        )
    shared = ops.cast(shared, routed.dtype)
    mode = layer.shared_experts_mode
    if layer.shared_gate_kernel is not None:
        # On torch `ops.matmul` would make float32 of float64.
        gate = ops.einsum("td,de->te", features, layer.shared_gate_kernel)
        missing = (1,) * (len(routed.shape) - 2)
        gate = ops.reshape(gate, (-1, *missing, gate.shape[-1]))
        if mode == "gate":
            shared = ops.sigmoid(gate) * shared
        else:
            gate = ops.softmax(gate)
            routed, shared = gate[..., :1] * routed, gate[..., 1:] * shared
    out = routed + zero_masked(shared, mask)
    return out / 2 if mode == "average" else out


def check_shared_experts(shared_experts, mode):
    if not isinstance(shared_experts, (keras.layers.Layer, type(None))):
        raise ValueError(
            "`shared_experts` must be a layer or None. "
            f"Received: shared_experts={shared_experts!r}"
        )
    if mode not in SHARED_EXPERTS_MODES:
        raise ValueError(
            f"`shared_experts_mode` must be one of {SHARED_EXPERTS_MODES}. "
            f"Received: shared_experts_mode={mode!r}"
        )
    if mode != "add" and shared_experts is None:
        raise ValueError(
            "`shared_experts_mode` needs `shared_experts`. Received: "
            f"shared_experts_mode={mode!r}, shared_experts=None"
        )
