"""torch-rechub: batch norm after each linear layer, those of gates too."""

import re

import numpy as np
from keras import ops

from keras_moe.layers import AITMTransfer
from tests.recommendation_cases.recorded import EPSILON


def matches(config, recorded):
    mmoe = recorded.has("experts.0.mlp.1") and recorded.has("gates.0.mlp")
    names = ("aits", "cgc_layers", "bottom_mlp", "tower_cvr")
    return mmoe or any(recorded.has(name) for name in names)


def outputs(config, recorded):
    if recorded.has("tower_cvr"):
        return {"y": _esmm(recorded)}
    x = recorded.inputs["x"]
    if recorded.has("bottom_mlp"):
        x = recorded.network(x, "bottom_mlp")
    elif recorded.has("aits"):
        x = _aitm(recorded, x)
    elif recorded.has("cgc_layers"):
        x = _ple(recorded, x)
    else:
        x = _mmoe(recorded, x)
    y = towers(recorded, x, "towers")
    # What a task is, is said only in the words of the case.
    kinds = re.findall("classification|regression", str(config))
    if len(kinds) == y.shape[1]:
        is_regression = np.array(kinds) == "regression"
        return {"y": ops.where(is_regression, y, ops.sigmoid(y))}
    return {"y": ops.sigmoid(y)}


def towers(recorded, x, name):
    """The logits of the tasks, `(B, T)`."""
    number = recorded.count(name + ".{}")
    networks = [f"{name}.{task}" for task in range(number)]
    return recorded.networks(x, networks, linear_last=True)[:, :, 0]


def _mmoe(recorded, x):
    tasks = recorded.count("gates.{}")
    experts = recorded.count("experts.{}")
    y, _ = recorded.moe(
        x,
        tasks,
        [[]] * tasks + [[f"experts.{e}" for e in range(experts)]],
        [f"gates.{t}" for t in range(tasks)],
    )
    return y


def _ple(recorded, x):
    levels = recorded.count("cgc_layers.{}")
    tasks = recorded.count("cgc_layers.0.gates_specific.{}")
    for level in range(levels):
        prefix = f"cgc_layers.{level}"
        last = level == levels - 1
        each = recorded.count(prefix + ".experts_specific.{}") // tasks
        experts = [
            [f"{prefix}.experts_specific.{t * each + e}" for e in range(each)]
            for t in range(tasks)
        ]
        shared = recorded.count(prefix + ".experts_shared.{}")
        experts.append([f"{prefix}.experts_shared.{e}" for e in range(shared)])
        gates = [f"{prefix}.gates_specific.{t}" for t in range(tasks)]
        if not last:
            gates.append(f"{prefix}.gate_shared")
        x, _ = recorded.moe(x, tasks, experts, gates, output_shared=not last)
    return x


def _aitm(recorded, x):
    tasks = recorded.count("bottoms.{}")
    x = recorded.networks(x, [f"bottoms.{t}" for t in range(tasks)])
    layer = AITMTransfer(
        info_normalization="batch", normalization_epsilon=EPSILON
    )
    y = layer(x)
    for step in range(tasks - 1):
        (info,) = recorded.blocks(f"info_gates.{step}")
        recorded.fill_dense(layer.infos[step], 0, info)
        for number, name in enumerate("qkv"):
            (block,) = recorded.blocks(f"aits.{step}.{name}_layer")
            recorded.fill_dense(layer.attentions[step], number, block)
    return y


def _esmm(recorded):
    sides = [
        recorded.embedding(ids, f"embedding.embed_dict.{name}.weight")
        for name, ids in recorded.inputs.items()
    ]
    x = ops.concatenate(sides, axis=1)
    networks = ["tower_cvr", "tower_ctr"]
    logits = recorded.networks(x, networks, linear_last=True)
    cvr, ctr = (ops.sigmoid(logits[:, task]) for task in range(2))
    return ops.concatenate([cvr, ctr, cvr * ctr], axis=1)
