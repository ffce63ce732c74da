"""AdaTT's repository: every model on units, `(B, units, D)`."""

from keras import ops

from keras_moe.layers import CrossStitch


def matches(config, recorded):
    return recorded.has("experts.0.0.mlp_net")


def outputs(config, recorded):
    x = recorded.inputs["x"]
    if recorded.has("stitchs"):
        return {"y": _cross_stitch(recorded, x)}
    if recorded.has("gates"):
        return {"y": _multi_level_mmoe(recorded, x)}
    return {"y": _levels(config, recorded, x)}


def _cross_stitch(recorded, x):
    for level in range(recorded.count("experts.{}")):
        tasks = recorded.count(f"experts.{level}" + ".{}")
        x = recorded.networks(x, [f"experts.{level}.{t}" for t in range(tasks)])
        layer = CrossStitch()
        x = layer(x)
        recorded.put(layer.kernel, f"stitchs.{level}.weight")
    return x


def _multi_level_mmoe(recorded, raw):
    x = raw
    for level in range(recorded.count("experts.{}")):
        experts = recorded.count(f"experts.{level}" + ".{}")
        units = recorded.count(f"gates.{level}" + ".{}")
        x, _ = recorded.moe(
            x,
            units,
            [[]] * units + [[f"experts.{level}.{e}" for e in range(experts)]],
            [f"gates.{level}.{u}" for u in range(units)],
            expert_slots=list(range(experts)) if level else None,
            gate_inputs=raw,
        )
    return x


def _levels(config, recorded, x):
    """AdaTT and PLE."""
    tasks = recorded.arrays_out["y"].shape[1]
    total = recorded.count("experts.0.{}")
    numbers = _numbers(config, tasks, total)
    levels = recorded.count("experts.{}")
    columns = len(recorded.weights["gate_weights.0.0.0.weight"])
    sees_all = columns == total
    has_shared = numbers[-1] > 0
    for level in range(levels):
        names = iter(f"experts.{level}.{e}" for e in range(total))
        experts = [[next(names) for _ in range(n)] for n in numbers]
        output_shared = has_shared and level < levels - 1
        gates = tasks + int(output_shared)
        is_adatt = sees_all and config.get("self_exp_res_connect", True)
        x, layer = recorded.moe(
            x,
            tasks,
            experts,
            [f"gate_weights.{level}.{u}" for u in range(gates)],
            visibility="all" if sees_all else "own_and_shared",
            output_shared=output_shared,
            self_residual="weights" if is_adatt else None,
        )
        if is_adatt:
            _fill_residual(recorded, layer, level, numbers[:gates])
    return x


def _numbers(config, tasks, total):
    numbers = config.get("num_task_expert_list")
    if numbers is None:
        numbers = config.get("num_task_experts", total // tasks)
    if isinstance(numbers, int):
        numbers = [numbers] * tasks
    return [*numbers, config.get("num_shared_experts", 0)]


def _fill_residual(recorded, layer, level, numbers):
    start = 0
    for unit, number in enumerate(numbers):
        part = slice(start, start + number)
        start += number
        if recorded.arrays_in["x"].shape[1] == layer.num_tasks:
            _put(recorded, layer, f"self_exp_weights.{level}", unit, part)
        else:
            _put(recorded, layer, f"self_exp_weights.{unit}", level, part)


def _put(recorded, layer, name, row, part):
    """One row of a recorded weight; the gradient of the others is zero."""
    if name not in recorded.weights:
        return  # one expert each: they are not learned
    shape = recorded.weights[name].shape

    def back(gradient):
        whole = ops.convert_to_numpy(ops.zeros(shape)).copy()
        whole[row] = gradient
        return whole

    recorded.put(
        layer.residual.weight, name, part, lambda weight: weight[row], back
    )
