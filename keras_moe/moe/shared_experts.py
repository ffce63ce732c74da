"""The output of shared experts, and how it joins the routed output."""

import functools

import keras
from keras import ops

from keras_moe.distribution.sending import apply_to_tokens
from keras_moe.experts import Experts
from keras_moe.moe.tokens import call_masked
from keras_moe.ops.masking import zero_masked

SHARED_EXPERTS_MODES = ("add", "gate", "average", "residual")
# Columns of the gate's kernel, in the modes that have a gate.
GATE_WIDTHS = {"gate": 1, "residual": 2}


def shared_output(shared_experts, tokens, mask, training):
    """A function that computes the output at its first call, or `None`.

    It may be called early, while rows travel to their experts.

    Args:
        shared_experts: A layer, a bank whose experts are summed, or `None`.
        tokens: `(T, D)`.
        mask: `(T,)` bool, or `None`. The output is zero where masked.
        training: bool.
    """
    if shared_experts is None:
        return None
    return functools.cache(
        functools.partial(_output, shared_experts, tokens, mask, training)
    )


def _output(shared_experts, tokens, mask, training):
    if not isinstance(shared_experts, Experts):
        return zero_masked(call_masked(shared_experts, tokens, mask), mask)

    def summed(bank, tokens):
        copies, num_tokens = bank.num_experts, ops.shape(tokens)[0]
        rows = bank(
            ops.tile(tokens, (copies,) + (1,) * (len(tokens.shape) - 1)),
            ops.zeros((copies,), "int32") + num_tokens,
            training=training,
        )
        rows = ops.reshape(rows, (copies, num_tokens, *ops.shape(rows)[1:]))
        return ops.sum(rows, axis=0)

    outputs = apply_to_tokens(shared_experts, summed, tokens)
    return zero_masked(outputs, mask)


def join(routed, shared, mode, features=None, gate_kernel=None):
    """Routed and shared outputs as one.

    Args:
        routed: `(T, ...)`.
        shared: The same shape, zero where masked.
        mode: One of `SHARED_EXPERTS_MODES`.
        features, gate_kernel: `(T, D)` and `(D, GATE_WIDTHS[mode])`, for
            modes with a gate.
    """
    if len(shared.shape) != len(routed.shape) or (
        shared.shape[-1] != routed.shape[-1]
    ):
        raise ValueError(
            "`shared_experts` must return what the experts return. Received "
            f"shape {tuple(shared.shape)} for {tuple(routed.shape)}"
        )
    shared = ops.cast(shared, routed.dtype)
    if mode in GATE_WIDTHS:
        kernel = ops.cast(gate_kernel, features.dtype)
        # On torch `ops.matmul` would make float32 of float64.
        gate = ops.einsum("td,de->te", features, kernel)
        missing = (1,) * (len(routed.shape) - 2)
        gate = ops.reshape(gate, (-1, *missing, GATE_WIDTHS[mode]))
    if mode == "gate":
        shared = ops.sigmoid(gate) * shared
    elif mode == "residual":
        gate = ops.softmax(gate)
        routed, shared = gate[..., :1] * routed, gate[..., 1:] * shared
    outputs = routed + shared
    return outputs / 2 if mode == "average" else outputs


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
