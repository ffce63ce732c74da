"""TorchEasyRec: PLE, MMoE with gate networks."""

from keras import ops


def matches(config, recorded):
    return recorded.has("0._task_layers") or recorded.has("gate_finals")


def outputs(config, recorded):
    if recorded.has("gate_finals"):
        trunk = _mmoe(recorded)
    else:
        trunk = _ple(recorded)
    return {f"trunk{t}": trunk[:, t] for t in range(trunk.shape[1])}


def _mmoe(recorded):
    tasks = recorded.count("gate_finals.{}")
    number = recorded.count("expert_mlps.{}")
    experts = [f"expert_mlps.{e}" for e in range(number)]
    gates = [
        recorded.blocks(f"gate_mlps.{t}") + recorded.blocks(f"gate_finals.{t}")
        for t in range(tasks)
    ]
    x = recorded.inputs["x"]
    return recorded.moe(x, tasks, [[]] * tasks + [experts], gates)[0]


def _ple(recorded):
    units = [recorded.inputs[f"x{u}"] for u in range(len(recorded.inputs))]
    x = ops.stack(units, axis=1)
    levels = recorded.count("{}._task_layers")
    tasks = recorded.count("0._task_layers.{}")
    for level in range(levels):
        experts = []
        for name in (
            *(f"{level}._task_layers.{t}" for t in range(tasks)),
            f"{level}._shared_layers",
        ):
            number = recorded.count(name + ".{}")
            experts.append([f"{name}.{e}" for e in range(number)])
        gates = [f"{level}._task_gates.{t}" for t in range(tasks)]
        last = level == levels - 1
        if not last:
            gates.append(f"{level}._shared_gate")
        x, _ = recorded.moe(x, tasks, experts, gates, output_shared=not last)
    return x
