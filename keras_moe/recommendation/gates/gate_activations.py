"""From the logits of gates to their weights, and to mixtures of experts.

Logits and weights are `(B, G, E)` for G gates. The constant boolean array
`visible` `(G, E)` says which experts a gate sees; all other weights are 0.
"""

import keras
import numpy as np
from keras import ops

from keras_moe.ops import activations
from keras_moe.ops.entmax import entmax15
from keras_moe.ops.entmax import sparsemax
from keras_moe.ops.grouped_matmul import batch_matmul
from keras_moe.ops.scores import softmax
from keras_moe.ops.selection import top_k_indices

NAMED = ("softmax", "sparsemax", "entmax15", "top_k", "dselect_k")


def get(identifier):
    """One of `NAMED`, or a function that Keras knows.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(identifier, str) and identifier in NAMED:
        return identifier
    try:
        return activations.get(identifier)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`activation` must be one of {NAMED} or a Keras activation. "
            f"Received: activation={identifier!r}"
        ) from error


def serialize(activation):
    if isinstance(activation, str):
        return activation
    return activations.serialize(activation)


def gate_weights(logits, visible, activation, top_k=None):
    """Turns the logits into weights.

    Args:
        logits: `(B, G, E)`.
        visible: `(G, E)` boolean array. Each gate sees an expert.
        activation: One of `NAMED` except `"dselect_k"`; or a function of the
            logits. The logits of experts that a gate does not see are minus
            infinity, so that a function normalizes over the others.
        top_k: int. For `"top_k"`: how many of the largest logits the softmax
            runs over.

    Returns:
        `(B, G, E)`.
    """
    # A Python float, not a tensor: tf2onnx replaces `where` by products with
    # the condition, and infinity times 0 is NaN.
    lowest = float("-inf")
    if not visible.all():
        logits = ops.where(visible, logits, lowest)
    if activation == "softmax":
        return softmax(logits)
    if activation == "sparsemax":
        return sparsemax(logits)
    if activation == "entmax15":
        return entmax15(logits)
    if activation == "top_k":
        num_experts = visible.shape[-1]
        flat = ops.reshape(logits, (-1, num_experts))
        chosen = ops.one_hot(top_k_indices(flat, top_k), num_experts)
        chosen = ops.reshape(ops.sum(chosen, axis=1), ops.shape(logits)) > 0
        return softmax(ops.where(chosen, logits, lowest))
    return only(visible, activation(logits))


def self_gate_weights(logits, own):
    """The self gates of HoME: a softmax over the unit's own experts.

    A unit with one expert has a sigmoid instead.
    """
    weights = ops.zeros_like(logits)
    number = own.sum(axis=-1, keepdims=True)
    if (number > 1).any():
        # A row in which all logits are minus infinity would give NaN.
        over = np.where(number > 1, own, True)
        softmaxed = gate_weights(logits, over, "softmax")
        weights = only(own & (number > 1), softmaxed)
    if (number == 1).any():
        weights = weights + only(own & (number == 1), ops.sigmoid(logits))
    return weights


def only(visible, weights):
    """Sets the weights of experts that a gate does not see to 0."""
    if visible.all():
        return weights
    return ops.where(visible, weights, ops.zeros_like(weights))


def drop_gates(weights, rate, seed, activation):
    """Drops weights at random and scales up the others.

    The weights of each gate keep their sum. If all of them would be dropped,
    they all stay. Weights from a Keras activation are divided by `1 - rate`
    instead, since negative ones can make the sum close to 0.
    """
    kept = keras.random.uniform(ops.shape(weights), seed=seed) >= rate
    rest = ops.where(kept, weights, ops.zeros_like(weights))
    if not isinstance(activation, str):
        return rest / (1 - rate)
    total = ops.sum(weights, axis=-1, keepdims=True)
    left = ops.sum(rest, axis=-1, keepdims=True)
    none = ops.equal(left, 0)
    left = ops.where(none, ops.ones_like(left), left)
    return ops.where(none, weights, rest * total / left)


def mix(weights, outputs, stopped=None):
    """The weighted sums of the experts' outputs, in the dtype of the weights.

    Args:
        weights: `(B, G, E)`.
        outputs: `(B, E, O)`.
        stopped: `(G, E)` boolean array. Where a gate sends no gradient into
            an expert. Defaults to `None`: it always does.

    Returns:
        `(B, G, O)`.
    """
    outputs = ops.cast(outputs, weights.dtype)
    if stopped is None or not stopped.any():
        return batch_matmul(weights, outputs)
    zeros = ops.zeros_like(weights)
    learning = batch_matmul(ops.where(stopped, zeros, weights), outputs)
    return learning + batch_matmul(
        ops.where(stopped, weights, zeros), ops.stop_gradient(outputs)
    )
