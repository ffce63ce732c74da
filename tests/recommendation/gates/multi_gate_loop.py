"""`MultiGateMoE` of one example after the other, in NumPy."""

import numpy as np
from keras import ops


def loop(layer, inputs, gate_inputs=None):
    """`(outputs, gates)` of a layer of `relu` experts, in inference."""
    weights = {
        variable.path.split("/", 1)[1]: ops.convert_to_numpy(variable)
        for variable in layer.weights
    }
    owners = _owners(layer)
    config = layer.get_config()
    outputs, all_gates = [], []
    for b in range(len(inputs)):
        x = inputs[b]
        experts = []
        for e, owner in enumerate(owners):
            slot = (
                owner
                if config["expert_slots"] is None
                else config["expert_slots"][e]
            )
            h = x if x.ndim == 1 else x[slot]
            if layer.feature_gate_rank is not None:
                down = weights["feature_gates/down_kernel"][e]
                up = weights["feature_gates/up_kernel"][e]
                h = h * 2 * _sigmoid(h @ down @ up)
            for n in range(len(layer.experts.units)):
                name = f"experts/dense_{n}"
                h = h @ weights[f"{name}/kernel"][e]
                h = np.maximum(h + weights[f"{name}/bias"][e], 0)
            experts.append(h)
        rows, y, row = [], [], 0
        residual = {"weights": 0, "gates": 0}
        for g in range(layer.num_gates):
            source = x if gate_inputs is None else gate_inputs[b]
            h = source if source.ndim == 1 else source[g]
            if (
                config["gate_input"] == "slot_plus_shared"
                and g < layer.num_tasks
            ):
                h = h + x[layer.num_tasks]
            own_input = h
            for n in range(len(layer.task_gates.units)):
                name = f"gates/mlp/dense_{n}"
                h = h @ weights[f"{name}/kernel"][g]
                h = np.maximum(h + weights[f"{name}/bias"][g], 0)
            seen = [e for e in range(len(owners)) if _sees(layer, g, e, owners)]
            logits = []
            for _ in seen:
                bias = (
                    weights["gates/bias"][row]
                    if layer.task_gates.use_bias
                    else 0
                )
                logits.append(weights["gates/kernel"][row] @ h + bias)
                row += 1
            shares = _softmax(np.array(logits) / layer.task_gates.temperature)
            rows.append(np.zeros(len(owners)))
            rows[-1][seen] = shares
            mixed = sum(rows[-1][e] * experts[e] for e in seen)
            own = [e for e, owner in enumerate(owners) if owner == g]
            if layer.self_residual == "weights":
                for e in own:
                    share = 1.0
                    if "residual/weight" in weights:
                        share = weights["residual/weight"][residual["weights"]]
                    residual["weights"] += 1
                    mixed = mixed + share * experts[e]
            if layer.self_residual == "gates" and own:
                logits = []
                for _ in own:
                    at = residual["gates"]
                    residual["gates"] += 1
                    kernel = weights["residual/kernel"][at]
                    logits.append(
                        kernel @ own_input + weights["residual/bias"][at]
                    )
                shares = _sigmoid(logits[0])
                shares = [shares] if len(own) == 1 else _softmax(logits)
                for e, share in zip(own, shares, strict=True):
                    mixed = mixed + share * experts[e]
            y.append(mixed)
        outputs.append(y)
        all_gates.append(rows)
    return np.array(outputs), np.array(all_gates)


def _owners(layer):
    numbers = layer.units.num_task_experts
    if isinstance(numbers, int):
        numbers = [numbers] * layer.num_tasks
    owners = []
    for unit, number in enumerate([*numbers, layer.units.num_shared_experts]):
        owners += [unit] * number
    return owners


def _sees(layer, gate, expert, owners):
    if not isinstance(layer.visibility, str):
        return layer.visibility[gate][expert] == 1
    is_shared = owners[expert] == layer.num_tasks
    if gate == layer.num_tasks:
        return is_shared or layer.units.shared_sees == "all"
    mine = owners[expert] == gate
    return layer.visibility == "all" or is_shared or mine


def _softmax(logits):
    shares = np.exp(np.array(logits) - np.max(logits))
    return shares / shares.sum()


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))
