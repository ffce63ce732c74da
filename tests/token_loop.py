"""A Mixture-of-Experts layer as a NumPy loop over tokens, in float64.

It shares nothing with the library but the formulas: no sorting, no grouping,
one token and one expert after the other. Gradients are central differences.
"""

import math

import numpy as np

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "linear": lambda x: x,
    "tanh": np.tanh,
}


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def expert(row, weights, e, activation, prefix="experts"):
    """One row through one expert, gated if there is a `gate_kernel`."""

    def dense(x, name):
        kernel = weights[f"{prefix}/{name}_kernel"][e]
        bias = weights.get(f"{prefix}/{name}_bias")
        return x @ kernel + (0.0 if bias is None else bias[e])

    act = ACTIVATIONS[activation]
    if f"{prefix}/gate_kernel" in weights:
        hidden = act(dense(row, "gate")) * dense(row, "up")
    else:
        hidden = act(dense(row, "up"))
    return dense(hidden, "down")


def route(tokens, weights, top_k, score="softmax", after=False, norm=True):
    """`(logits, probs, indices, weights)`, ties to the lower index."""
    kernel = weights["router/kernel"]
    score = {"softmax": softmax, "sigmoid": sigmoid}[score]
    num_tokens, num_experts = len(tokens), kernel.shape[1]
    logits = np.zeros((num_tokens, num_experts))
    probs = np.zeros((num_tokens, num_experts))
    indices = np.zeros((num_tokens, top_k), int)
    expert_weights = np.zeros((num_tokens, top_k))
    for t in range(num_tokens):
        logits[t] = tokens[t] @ kernel + weights.get("router/bias", 0.0)
        probs[t] = score(logits[t])
        indices[t] = sorted(range(num_experts), key=lambda e: -logits[t, e])[
            :top_k
        ]
        chosen = indices[t]
        w = score(logits[t, chosen]) if after else probs[t, chosen]
        expert_weights[t] = w / w.sum() if norm else w
    return logits, probs, indices, expert_weights


def keep(
    indices,
    expert_weights,
    num_experts,
    mask,
    capacity,
    policy,
    groups=1,
    priority=None,
):
    """Which choices an expert has room for, asked one after the other.

    `priority` is one number a token, for the policy of that name.
    """
    num_tokens, top_k = indices.shape
    order = [(k, t) for k in range(top_k) for t in range(num_tokens)]
    if policy == "weight":
        order.sort(key=lambda kt: -expert_weights[kt[1], kt[0]])
    if policy == "token":
        order.sort(key=lambda kt: (kt[1], kt[0]))
    if policy == "priority":
        order.sort(key=lambda kt: (kt[0], -priority[kt[1]]))
    room = np.full(
        (groups, num_experts + 1), math.inf if capacity is None else capacity
    )
    room[:, num_experts] = 0  # of choices that do not exist
    kept = np.zeros(indices.shape, bool)
    for k, t in order:
        place = t // (num_tokens // groups), indices[t, k]
        if mask[t] and room[place] > 0:
            room[place] -= 1
            kept[t, k] = True
    return kept


def moe(
    tokens,
    weights,
    top_k,
    activation,
    mask=None,
    capacity=None,
    policy="position",
    **router,
):
    """`(outputs, kept, logits, probs, indices)` for tokens `(T, D)`."""
    mask = np.ones(len(tokens), bool) if mask is None else mask
    tokens = np.where(mask[:, None], tokens, 0.0)
    logits, probs, indices, expert_weights = route(
        tokens, weights, top_k, **router
    )
    kept = keep(indices, expert_weights, probs.shape[1], mask, capacity, policy)
    outputs = np.zeros(tokens.shape)
    for t, k in np.argwhere(kept):
        e = indices[t, k]
        y = expert(tokens[t], weights, e, activation)
        outputs[t] += expert_weights[t, k] * y
    return outputs, kept, logits, probs, indices


def load_balancing_loss(probs, indices, mask=None):
    mask = np.ones(len(probs), bool) if mask is None else mask
    num_experts, f, p = probs.shape[1], 0.0, 0.0
    if not mask.any():
        return 0.0
    f = np.zeros(num_experts)
    p = np.zeros(num_experts)
    for t in np.flatnonzero(mask):
        for e in indices[t]:
            f[e] += 1
        p += probs[t] / probs[t].sum()
    return num_experts * np.sum(f / f.sum() * p / mask.sum())


def router_z_loss(logits, mask=None):
    mask = np.ones(len(logits), bool) if mask is None else mask
    values = [
        np.log(np.exp(logits[t]).sum()) ** 2 for t in np.flatnonzero(mask)
    ]
    return float(np.mean(values)) if values else 0.0


def gradients(function, arrays, epsilon=1e-6):
    """Central differences of `function(arrays)` for each array of a dict."""
    arrays = {k: np.array(v, "float64") for k, v in arrays.items()}
    result = {}
    for name, array in arrays.items():
        result[name] = np.zeros(array.shape)
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + epsilon
            above = function(arrays)
            array[index] = value - epsilon
            below = function(arrays)
            array[index] = value
            result[name][index] = (above - below) / (2 * epsilon)
    return result
