"""deepctr-torch: every layer has a ReLU, gates and last layers no bias."""

from keras import ops

from keras_moe.layers import CrossNetMix
from tests.recommendation_cases.recorded import Block


def matches(config, recorded):
    names = ("ctr_dnn", "bottom_dnn", "specific_experts.0.0.0", "U_list")
    mmoe = recorded.has("expert_dnn") and not recorded.has("task_weight")
    return mmoe or any(recorded.has(name) for name in names)


def outputs(config, recorded):
    x = recorded.inputs["x"]
    if recorded.has("U_list"):
        return {"y": _cross_net_mix(recorded, x)}
    if recorded.has("ctr_dnn"):
        return {"y": _esmm(recorded, x)}
    if recorded.has("bottom_dnn"):
        return {"y": towers(recorded, recorded.network(x, "bottom_dnn"))}
    if recorded.has("expert_dnn"):
        return {"y": towers(recorded, mmoe(recorded, x))}
    return {"y": towers(recorded, _ple(recorded, x))}


def towers(recorded, x):
    """The probabilities of the tasks, `(B, T)`."""
    networks = []
    for task in range(recorded.count("out.{}")):
        last = Block(f"tower_dnn_final_layer.{task}", bias=f"out.{task}.bias")
        networks.append([*recorded.blocks(f"tower_dnn.{task}"), last])
    logits = recorded.networks(x, networks, linear_last=True)
    return ops.sigmoid(logits[:, :, 0])


def gate(recorded, hidden, last):
    return [*recorded.blocks(hidden), Block(last)]


def mmoe(recorded, x):
    experts = recorded.count("expert_dnn.{}")
    tasks = recorded.count("gate_dnn_final_layer.{}")
    y, _ = recorded.moe(
        x,
        tasks,
        [[]] * tasks + [[f"expert_dnn.{e}" for e in range(experts)]],
        [
            gate(recorded, f"gate_dnn.{t}", f"gate_dnn_final_layer.{t}")
            for t in range(tasks)
        ],
    )
    return y


def _ple(recorded, x):
    levels = recorded.count("specific_experts.{}")
    tasks = recorded.count("specific_experts.0.{}")
    for level in range(levels):
        last = level == levels - 1
        experts = []
        for folder, units in (("specific", tasks), ("shared", 1)):
            for unit in range(units):
                prefix = f"{folder}_experts.{level}.{unit}"
                number = recorded.count(prefix + ".{}")
                experts.append([f"{prefix}.{e}" for e in range(number)])
        gates = [
            gate(
                recorded,
                f"specific_gate_dnn.{level}.{task}",
                f"specific_gate_dnn_final_layer.{level}.{task}",
            )
            for task in range(tasks)
        ]
        if not last:
            hidden = f"shared_gate_dnn.{level}"
            gates.append(
                gate(recorded, hidden, f"shared_gate_dnn_final_layer.{level}")
            )
        x, _ = recorded.moe(x, tasks, experts, gates, output_shared=not last)
    return x


def _esmm(recorded, x):
    networks = [
        [
            *recorded.blocks(f"{task}_dnn"),
            Block(f"{task}_dnn_final_layer", bias="out.bias"),
        ]
        for task in ("ctr", "cvr")
    ]
    logits = recorded.networks(x, networks, linear_last=True)
    ctr, cvr = (ops.sigmoid(logits[:, task]) for task in range(2))
    return ops.concatenate([ctr, ctr * cvr], axis=1)


def _cross_net_mix(recorded, x):
    layers, experts, _, rank = recorded.weights["U_list"].shape
    layer = CrossNetMix(rank, experts, layers, share_gates=True)
    y = layer(x)

    def swap(kernel):
        return kernel.swapaxes(-1, -2)

    recorded.put(layer.down_kernel, "V_list")
    recorded.put(layer.middle_kernel, "C_list", to=swap, back=swap)
    recorded.put(layer.up_kernel, "U_list", to=swap, back=swap)
    recorded.put(
        layer.bias,
        "bias",
        to=lambda bias: bias[..., 0],
        back=lambda gradient: gradient[..., None],
    )
    for expert in range(experts):
        recorded.put(
            layer.gate_kernel,
            f"gating.{expert}.weight",
            (0, slice(None), expert),
            to=lambda weight: weight[0],
            back=lambda gradient: gradient[None],
        )
    return y
