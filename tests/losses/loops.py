"""The losses as NumPy loops over tokens and experts, in float64.

`r` is a `Routing` of float64 arrays; `tokens` are the numbers of the tokens
that are looked at together.
"""

import math

import numpy as np

from tests import token_loop


def over_groups(function, num_tokens, mask, groups):
    """Mean of `function(tokens)` over the groups that have a token."""
    size, values = num_tokens // groups, []
    for g in range(groups):
        tokens = [t for t in range(g * size, (g + 1) * size) if mask[t]]
        if tokens:
            values.append(function(tokens))
    return float(np.mean(values)) if values else 0.0


def scores_of(r, t, scores):
    if scores == "softmax":
        return token_loop.softmax(r.logits[t])
    if scores == "raw":
        return r.probs[t]
    return r.probs[t] / r.probs[t].sum()


def mean_scores(r, tokens, scores="router"):
    return sum(scores_of(r, t, scores) for t in tokens) / len(tokens)


def load_balancing(
    r, tokens, assignments="all", scores="router", normalize=True
):
    num_experts = r.probs.shape[1]
    f = np.zeros(num_experts)
    for t in tokens:
        chosen = r.expert_indices[t]
        if assignments == "first":
            chosen = chosen[:1]
        if assignments == "logits":
            order = sorted(range(num_experts), key=lambda e: -r.logits[t, e])
            chosen = order[: len(chosen)]
        for e in chosen:
            if e < num_experts:
                f[e] += 1
    f /= max(f.sum() if normalize else len(tokens), 1)
    return num_experts * np.sum(f * mean_scores(r, tokens, scores))


def variation(values, ddof):
    mean = values.sum() / len(values)
    if len(values) == 1 or mean == 0:
        return 0.0
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - ddof)
    return variance / mean**2


def importance(r, tokens, scores="weights", ddof=0):
    if scores != "weights":
        return variation(mean_scores(r, tokens, scores), ddof)
    total = np.zeros(r.probs.shape[1])
    for t in tokens:
        for k, e in enumerate(r.expert_indices[t]):
            if e < len(total):
                total[e] += r.expert_weights[t, k]
    return variation(total, ddof)


def load(r, tokens, ddof=0):
    return variation(sum(r.load[t] for t in tokens), ddof)


def entropy(p):
    return -sum(q * math.log(q) for q in p if q > 0)


def token_entropy(r, tokens):
    return np.mean([entropy(scores_of(r, t, "router")) for t in tokens])


def marginal_entropy(r, tokens):
    return entropy(mean_scores(r, tokens))


def device_balance(r, tokens, num_devices):
    num_experts = r.probs.shape[1]
    size = num_experts // num_devices
    p = mean_scores(r, tokens)
    f, total = np.zeros(num_devices), 0
    for t in tokens:
        for e in r.expert_indices[t]:
            if e < num_experts:
                f[e // size] += 1
                total += 1
    p = [p[d * size : (d + 1) * size].sum() for d in range(num_devices)]
    return num_devices * np.sum(f / max(total, 1) * p)


def communication_balance(r, tokens, num_devices, max_devices):
    num_experts = r.probs.shape[1]
    size = num_experts // num_devices
    p = mean_scores(r, tokens)
    total = 0.0
    for d in range(num_devices):
        experts = range(d * size, (d + 1) * size)
        sent = sum(
            any(e in experts for e in r.expert_indices[t]) for t in tokens
        )
        f = num_devices / (max_devices * len(tokens)) * sent
        total += f * p[d * size : (d + 1) * size].sum()
    return total


def expected_load(clean, noisy, stddev, top_k, threshold):
    """One expert after the other, with the sorted logits of the others."""
    num_tokens, num_experts = clean.shape
    stddev = np.broadcast_to(stddev, clean.shape)
    result = np.ones(clean.shape)
    if top_k == num_experts:
        return result
    for t, e in np.ndindex(clean.shape):
        rivals = list(noisy[t])
        if threshold == "exact":
            rivals.pop(e)
        limit = sorted(rivals)[-top_k]
        x = (clean[t, e] - limit) / stddev[t, e]
        result[t, e] = (1 + math.erf(x / math.sqrt(2))) / 2
    return result
