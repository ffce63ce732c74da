"""STEM's repository: an input for each unit, gates of one layer or more."""

from keras import ops


def matches(config, recorded):
    return any(
        recorded.has(name)
        for name in (
            "layers.0.specific_experts",
            "gate.mlp",
            "gate.0.mlp",
        )
    )


def outputs(config, recorded):
    if recorded.has("layers"):
        trunks = _levels(recorded)
    else:
        trunks = _mmoe(recorded)
    return {f"trunk{t}": trunk for t, trunk in enumerate(trunks)}


def _mmoe(recorded):
    """MMoE, and OMoE, whose one gate stands for all tasks."""
    one = recorded.has("gate.mlp")
    gates = 1 if one else recorded.count("gate.{}")
    experts = [f"experts.{e}" for e in range(recorded.count("experts.{}"))]
    y, _ = recorded.moe(
        recorded.inputs["x"],
        gates,
        [[]] * gates + [experts],
        ["gate"] if one else [f"gate.{t}" for t in range(gates)],
    )
    tasks = len(recorded.arrays_out)
    return [y[:, 0 if one else t] for t in range(tasks)]


def _levels(recorded):
    """CGC, PLE and STEM, whose gates see all experts."""
    tasks = len(recorded.inputs) - 1
    units = [recorded.inputs[f"x{u}"] for u in range(tasks + 1)]
    x = ops.stack(units, axis=1)
    levels = recorded.count("layers.{}")
    for level in range(levels):
        prefix = f"layers.{level}"
        last = level == levels - 1
        experts = []
        for task in range(tasks):
            own = f"{prefix}.specific_experts.{task}"
            number = recorded.count(own + ".{}")
            experts.append([f"{own}.{e}" for e in range(number)])
        number = recorded.count(prefix + ".shared_experts.{}")
        experts.append([f"{prefix}.shared_experts.{e}" for e in range(number)])
        gates = [f"{prefix}.gate.{u}" for u in range(tasks + (not last))]
        logits = recorded.blocks(gates[0])[-1].linear
        seen = len(recorded.weights[f"{logits}.weight"])
        is_stem = seen == sum(len(unit) for unit in experts)
        settings = {"shared_sees": "shared"}
        if is_stem:
            settings = {
                "visibility": "all",
                "gate_input": "slot_plus_shared",
                "stop_cross_task_gradients": True,
            }
        x, _ = recorded.moe(
            x, tasks, experts, gates, output_shared=not last, **settings
        )
    return [x[:, task] for task in range(tasks)]
