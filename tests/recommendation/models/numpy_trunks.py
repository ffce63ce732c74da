"""Levels of experts in NumPy, wired by hand in the tests."""

import numpy as np
from keras import ops


def randomize(model, seed=0):
    """Weights of which none is zero; variances stay positive."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "float" not in str(variable.dtype):
            continue
        value = rng.normal(scale=0.5, size=tuple(variable.shape))
        if variable.path.endswith("variance"):
            value = rng.uniform(0.5, 2.0, tuple(variable.shape))
        variable.assign(value.astype("float32"))


def weights_of(layer):
    """Float64 arrays by the path below the layer."""
    return {
        variable.path.split("/", 1)[1]: ops.convert_to_numpy(variable).astype(
            "float64"
        )
        for variable in layer.weights
    }


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softmax(x):
    shares = np.exp(x - x.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def layer_norm(h, gamma, beta):
    h = h - h.mean(axis=-1, keepdims=True)
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-3) * gamma + beta


def network(w, e, x, activation=relu, prefix="", normalize="layer"):
    """Network `e` of a `StackedMLP`, with the normalization it has."""
    number = 0
    while f"{prefix}dense_{number}/kernel" in w:
        dense = f"{prefix}dense_{number}/"
        x = x @ w[f"{dense}kernel"][e] + w[f"{dense}bias"][e]
        if f"{dense}gamma" in w:
            x = layer_norm(x, w[f"{dense}gamma"][e], w[f"{dense}beta"][e])
        if f"{dense}normalization/gamma" in w:
            gamma, beta, mean, variance = (
                w[f"{dense}normalization/{name}"].reshape(-1, x.shape[-1])[e]
                for name in ("gamma", "beta", "moving_mean", "moving_variance")
            )
            x = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
        x = activation(x)
        number += 1
    return x


def experts(w, reads, activation=relu):
    """What each expert of a `MultiGateMoE` makes of what it reads."""
    outputs = []
    for e, x in enumerate(reads):
        if "feature_gates/down_kernel" in w:
            down = w["feature_gates/down_kernel"][e]
            x = x * 2 * sigmoid(x @ down @ w["feature_gates/up_kernel"][e])
        outputs.append(network(w, e, x, activation, "experts/"))
    return outputs


def gates(w, reads, sees, name="gates"):
    """A list of shares `(B, experts seen)`; gate by gate in the kernel."""
    shares, start = [], 0
    for x, seen in zip(reads, sees, strict=True):
        rows = slice(start, start + len(seen))
        start += len(seen)
        logits = x @ w[f"{name}/kernel"][rows].T + w[f"{name}/bias"][rows]
        alone = name == "residual" and len(seen) == 1
        to_shares = sigmoid if alone or not seen else softmax
        shares.append(to_shares(logits))
    return shares


def mix(shares, outputs, sees):
    """For each gate the sum of the experts it sees."""
    return [
        sum(share[:, i : i + 1] * outputs[e] for i, e in enumerate(seen))
        for share, seen in zip(shares, sees, strict=True)
    ]


def level(layer, reads, gate_reads, sees):
    """A level without residuals: what each gate gives."""
    w = weights_of(layer)
    return mix(gates(w, gate_reads, sees), experts(w, reads), sees)


def predictions(model, trunks):
    """Of binary tasks without hidden layers, from what their towers read."""
    found = {}
    for task, x in zip(model.tasks, trunks, strict=True):
        w = weights_of(model.get_layer(f"{task.name}_logits"))
        found[task.name] = sigmoid(x @ w["kernel"] + w["bias"])
    return found
