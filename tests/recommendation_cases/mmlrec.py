"""MMLRec: SNR, HMoE and STAR."""

import numpy as np
from keras import ops

from keras_moe.layers import STARDense
from keras_moe.layers import SubNetworkRouting
from tests.recommendation_cases import deepctr


def matches(config, recorded):
    return any(
        recorded.has(name)
        for name in ("trans.gate1", "task_weight", "linears.0.shared_weight")
    )


def outputs(config, recorded):
    x = recorded.inputs["x"]
    if recorded.has("trans"):
        return {"y": deepctr.towers(recorded, _snr(recorded, x))}
    if recorded.has("task_weight"):
        return {"y": _hmoe(recorded, x)}
    return {"y": _star(recorded, x)}


def _snr(recorded, x):
    """`u`, drawn elsewhere, is learned here, and a part of `log_alpha`."""
    level = 1
    while recorded.has(f"trans.trans{level}"):
        number = recorded.count(f"trans.trans{level}" + ".{}")
        x = recorded.networks(
            x, [f"trans.trans{level}.{j}" for j in range(number)]
        )
        gate = f"trans.gate{level}"
        u, alpha = (
            recorded.weights[f"{gate}.u"],
            recorded.weights[f"{gate}.alpha"],
        )
        kernels = recorded.weights[f"{gate}.trans_matrix.0.0"]
        layer = SubNetworkRouting(len(u), kernels.shape[1])
        x = layer(x)
        _fill_codes(recorded, layer.log_alpha, gate, u, alpha)
        for i in range(u.shape[0]):
            for j in range(u.shape[1]):
                name = f"{gate}.trans_matrix.{i}.{j}"
                recorded.put(layer.kernel, name, (i, j))
        level += 1
    return x


def _fill_codes(recorded, variable, gate, u, alpha):
    u, alpha, beta = u.astype("float64"), alpha.astype("float64"), 0.9
    codes = np.log(u) - np.log1p(-u) + np.log(alpha) / beta
    recorded.put(
        variable, f"{gate}.u", ..., lambda _: codes, lambda d: d / (u * (1 - u))
    )
    recorded.put(
        variable,
        f"{gate}.alpha",
        ...,
        lambda _: codes,
        lambda d: d.sum(keepdims=True).reshape(1) / (beta * alpha),
    )


def _hmoe(recorded, x):
    """Towers, and then a `MultiGateMoE` of what the towers give."""
    trunk = deepctr.mmoe(recorded, x)
    tasks = recorded.count("out.{}")
    hidden = recorded.networks(trunk, [f"tower_dnn.{t}" for t in range(tasks)])
    mixed, _ = recorded.moe(
        hidden,
        tasks,
        [],
        [
            deepctr.gate(
                recorded, f"task_weight.{t}", f"task_weight_final_layer.{t}"
            )
            for t in range(tasks)
        ],
        expert_units=(),
        num_task_experts=1,
        num_shared_experts=0,
        visibility="all",
        stop_cross_task_gradients=True,
        gate_inputs=x,
    )
    lasts = [
        [deepctr.Block(f"tower_dnn_final_layer.{t}", bias=f"out.{t}.bias")]
        for t in range(tasks)
    ]
    logits = recorded.networks(mixed, lasts, linear_last=True)
    return ops.sigmoid(logits[:, :, 0])


def _star(recorded, x):
    domains = recorded.count("out.{}")
    for number in range(recorded.count("linears.{}")):
        prefix = f"linears.{number}"
        units = recorded.weights[f"{prefix}.shared_weight"].shape[1]
        layer = STARDense(domains, units, activation="relu")
        x = layer(x)
        for d in range(domains):
            _fill_domain(recorded, layer, prefix, d, d, domains)
        recorded.put(layer.kernel, f"{prefix}.shared_weight")
        recorded.put(layer.bias, f"{prefix}.shared_bias")
    columns = []
    for d in range(
        domains
    ):  # each has a last layer of its own, shared part too
        prefix = f"final_layers.{d}"
        layer = STARDense(1, 1)
        y = layer(x[:, d])[:, 0]
        _fill_domain(recorded, layer, prefix, 0, d, domains)
        recorded.put(layer.kernel, f"{prefix}.shared_weight")
        _fill_sum(
            recorded, layer.bias, f"{prefix}.shared_bias", f"out.{d}.bias"
        )
        columns.append(ops.sigmoid(y))
    return ops.concatenate(columns, axis=1)


def _fill_domain(recorded, layer, prefix, at, domain, domains):
    last = domain == domains - 1
    for variable, name in (
        (layer.domain_kernel, "weight"),
        (layer.domain_bias, "bias"),
    ):
        plural = {"weight": "weights", "bias": "biases"}[name]
        name = f"specific_{name}" if last else f"specific_{plural}.{domain}"
        recorded.put(variable, f"{prefix}.{name}", at)


def _fill_sum(recorded, variable, *names):
    """One variable in the place of recorded biases that are added up."""
    total = sum(recorded.weights[name] for name in names)
    for name in names:
        recorded.put(variable, name, to=lambda _: total)
