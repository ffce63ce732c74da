"""Multitask-Recommendation-Library: whole models, with their embedding."""

from keras import ops

from keras_moe.layers import AITMTransfer
from tests.recommendation_cases.torch_rechub import towers


def matches(config, recorded):
    return recorded.has("embedding.embedding")


def outputs(config, recorded):
    ids = recorded.embedding(
        recorded.inputs["ids"][:, 0], "embedding.embedding.weight"
    )
    numbers = recorded.dense(recorded.inputs["num"], "numerical_layer")
    x = ops.concatenate([ids, numbers], axis=1)
    if recorded.has("h1"):
        x = _aitm(recorded, x)
    elif recorded.has("task_experts"):
        x = _ple(recorded, x)
    else:
        x = _mmoe(recorded, x)
    y = ops.sigmoid(towers(recorded, x, "tower"))
    return {f"y{t}": y[:, t] for t in range(y.shape[1])}


def _mmoe(recorded, x):
    """MMoE, and OMoE, whose one gate stands for all tasks."""
    experts = [f"expert.{e}" for e in range(recorded.count("expert.{}"))]
    one = not recorded.has("gate.0.0")
    tasks = 1 if one else recorded.count("gate.{}")
    gates = ["gate"] if one else [f"gate.{t}" for t in range(tasks)]
    y, _ = recorded.moe(x, tasks, [[]] * tasks + [experts], gates)
    return y[:, 0] if one else y


def _ple(recorded, x):
    levels = recorded.count("task_experts.{}")
    tasks = recorded.count("task_experts.0.{}")
    for level in range(levels):
        last = level == levels - 1
        experts = []
        for name in (
            *(f"task_experts.{level}.{t}" for t in range(tasks)),
            f"share_experts.{level}",
        ):
            number = recorded.count(name + ".{}")
            experts.append([f"{name}.{e}" for e in range(number)])
        gates = [f"task_gates.{level}.{t}" for t in range(tasks)]
        if not last:
            gates.append(f"share_gates.{level}")
        x, _ = recorded.moe(x, tasks, experts, gates, output_shared=not last)
    return x


def _aitm(recorded, x):
    tasks = recorded.count("bottom.{}")
    x = recorded.networks(x, [f"bottom.{t}" for t in range(tasks)])
    layer = AITMTransfer(
        share_attention=True, attention_use_bias=True, info_activation=None
    )
    y = layer(x)
    for step in range(tasks - 1):
        (info,) = recorded.blocks(f"g.{step}")
        recorded.fill_dense(layer.infos[step], 0, info)
    for number, name in enumerate(("h3", "h2", "h1")):  # query, key, value
        (block,) = recorded.blocks(name)
        recorded.fill_dense(layer.attentions[0], number, block)
    return y
