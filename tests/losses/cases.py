"""The losses on routings, and routings to try them on."""

from typing import Any
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_moe import losses
from tests import token_loop
from tests.losses import loops

T, E, K, SEQUENCES = 12, 6, 2, 3


class LoadRouting(NamedTuple):
    logits: Any
    probs: Any
    expert_indices: Any
    expert_weights: Any
    load: Any


def arrays(seed=0, num_tokens=T, num_experts=E, top_k=K, sigmoid=False):
    """No token chooses the last expert, and some choices do not exist."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_tokens, num_experts))
    indices = np.zeros((num_tokens, top_k), int)
    for t in range(num_tokens):
        order = rng.permutation(max(num_experts - 1, 1))
        order = np.append(order, [num_experts] * top_k)[:top_k]
        indices[t] = order
    if top_k > 1:
        indices[1::5, 1] = num_experts
    return logits, indices


def routing_of(logits, indices, sigmoid=False):
    """In NumPy."""
    act = token_loop.sigmoid if sigmoid else token_loop.softmax
    probs = np.array([act(z) for z in logits]).reshape(logits.shape)
    weights = np.zeros(indices.shape)
    for t, k in np.ndindex(indices.shape):
        if indices[t, k] < logits.shape[1]:
            weights[t, k] = probs[t, indices[t, k]]
    load = np.array([token_loop.sigmoid(2 * z - 1) for z in logits])
    return LoadRouting(
        logits, probs, indices, weights, load.reshape(logits.shape)
    )


def tensor_routing_of(logits, indices, sigmoid=False):
    """The same with tensors, differentiable in the logits."""
    probs = (ops.sigmoid if sigmoid else ops.softmax)(logits)
    exists = indices < logits.shape[1]
    one_hot = np.zeros((*indices.shape, logits.shape[1]), "float32")
    for t, k in np.argwhere(exists):
        one_hot[t, k, indices[t, k]] = 1
    weights = ops.einsum("te,tke->tk", probs, ops.array(one_hot))
    load = ops.sigmoid(2 * logits - 1)
    return LoadRouting(
        logits, probs, ops.array(indices.astype("int32")), weights, load
    )


def tensors(r, dtype="float32"):
    return LoadRouting(
        *(
            ops.array(x.astype("int32" if x.dtype.kind == "i" else dtype))
            for x in r
        )
    )


def loop(function, **kwargs):
    return lambda r, tokens: function(r, tokens, **kwargs)


BALANCE = losses.LoadBalancingLoss
# Name -> loss of weight 1, its loop.
CASES = {
    "balance": (BALANCE(1.0), loop(loops.load_balancing)),
    "balance_first": (
        BALANCE(1.0, assignments="first"),
        loop(loops.load_balancing, assignments="first"),
    ),
    "balance_hf": (
        BALANCE(
            1.0,
            normalize_by_top_k=False,
            assignments="logits",
            scores="softmax",
        ),
        loop(
            loops.load_balancing,
            normalize=False,
            assignments="logits",
            scores="softmax",
        ),
    ),
    "balance_raw": (
        BALANCE(1.0, scores="raw"),
        loop(loops.load_balancing, scores="raw"),
    ),
    "importance": (losses.ImportanceLoss(1.0), loop(loops.importance)),
    "importance_softmax": (
        losses.ImportanceLoss(1.0, scores="softmax", ddof=1),
        loop(loops.importance, scores="softmax", ddof=1),
    ),
    "load": (losses.LoadLoss(1.0, ddof=1), loop(loops.load, ddof=1)),
    "entropy": (losses.EntropyLoss(1.0), loop(loops.token_entropy)),
    "marginal": (
        losses.EntropyLoss(1.0, kind="marginal"),
        lambda r, tokens: -loops.marginal_entropy(r, tokens),
    ),
    "threshold": (
        losses.EntropyLoss(1.0, kind="marginal", threshold=1.75),
        lambda r, tokens: max(0.0, 1.75 - loops.marginal_entropy(r, tokens)),
    ),
    "information": (
        losses.MutualInformationLoss(1.0),
        lambda r, tokens: (
            loops.token_entropy(r, tokens) - loops.marginal_entropy(r, tokens)
        ),
    ),
    "devices": (
        losses.DeviceBalanceLoss(3, 1.0),
        loop(loops.device_balance, num_devices=3),
    ),
    "communication": (
        losses.CommunicationBalanceLoss(3, 2, 1.0),
        loop(loops.communication_balance, num_devices=3, max_devices=2),
    ),
    "z": (
        losses.RouterZLoss(1.0),
        lambda r, tokens: token_loop.router_z_loss(r.logits[tokens]),
    ),
}
GROUPED = [name for name in CASES if name != "z"]
# The second sequence of four tokens is masked altogether.
MASK = np.array([1, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1, 1], bool)


def with_per(loss, per):
    return type(loss).from_config({**loss.get_config(), "per": per})
