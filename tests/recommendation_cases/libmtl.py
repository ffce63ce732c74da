"""LibMTL: linear gates with a bias, in CGC over the shared experts first."""

import numpy as np


def matches(config, recorded):
    return recorded.has("decoders")


def outputs(config, recorded):
    x = recorded.inputs["x"]
    tasks = sorted(
        {key.split(".")[1] for key in recorded.weights if "decoders" in key}
    )
    shared = _experts(recorded, "experts_shared")
    own = [_experts(recorded, f"experts_specific.{task}") for task in tasks]
    if recorded.has("_z_logits"):
        trunk = _dselect_k(recorded, x, tasks, [*own, shared])
    else:
        trunk = _softmax(recorded, x, tasks, [*own, shared])
    return {
        task: recorded.dense(trunk[:, t], f"decoders.{task}")
        for t, task in enumerate(tasks)
    }


def _experts(recorded, prefix):
    number = recorded.count(prefix + ".{}")
    return [f"{prefix}.{e}" for e in range(number)]


def _softmax(recorded, x, tasks, experts):
    ends = np.cumsum([0, *(len(unit) for unit in experts)])
    shared = list(range(ends[-2], ends[-1]))
    orders = [
        [*shared, *range(ends[t], ends[t + 1])] for t in range(len(tasks))
    ]
    gates = [f"gate_specific.{task}" for task in tasks]
    y, _ = recorded.moe(x, len(tasks), experts, gates, orders)
    return y


def _dselect_k(recorded, x, tasks, experts):
    top_k = len(recorded.weights[f"_w_logits.{tasks[0]}.weight"])
    y, layer = recorded.moe(
        x,
        len(tasks),
        experts,
        [],
        gate_activation="dselect_k",
        gate_top_k=top_k,
    )
    selectors = layer.task_gates.selectors
    for number, task in enumerate(tasks):
        for kind, name in (("selector", "_z_logits"), ("mixture", "_w_logits")):
            recorded.put(
                getattr(selectors, f"{kind}_kernel"),
                f"{name}.{task}.weight",
                number,
                np.transpose,
                np.transpose,
            )
            bias = getattr(selectors, f"{kind}_bias")
            recorded.put(bias, f"{name}.{task}.bias", number)
    return y
