"""PEPNet's gates, as TorchEasyRec, FuxiCTR, MMLRec and SWR have them."""

import numpy as np
from keras import ops

from keras_moe.layers import EPNet
from keras_moe.layers import GateNU
from keras_moe.layers import PPNet
from keras_moe.recommendation.layers.star_dense import of_domain
from tests.recommendation_cases.recorded import EPSILON

GATES = ("dense_layers", "network.0", "gate_nu", "gate_nus")


def matches(config, recorded):
    return (
        any(recorded.has(name) for name in GATES)
        or recorded.has("gate_layers.0.gate")
        or recorded.has("domain_tower")
    )


def outputs(config, recorded):
    for name in ("dense_layers", "network"):
        if recorded.has(name):
            return {"y": _gate_nu(recorded, name)}
    if recorded.has("gate_nu"):
        return {"y": _epnet(recorded)}
    if recorded.has("gate_nus"):
        return _of_tasks(recorded)
    if recorded.has("domain_tower"):
        return {"y": _of_domains(recorded)}
    return {"y": _tower(recorded)}


def _gate_nu(recorded, name):
    hidden, output = recorded.blocks(name)
    layer = GateNU(_width(recorded, output), _width(recorded, hidden))
    y = layer(recorded.inputs["x"])
    fill_gate(recorded, layer, 0, name)
    return y


def _width(recorded, block):
    return len(recorded.weights[f"{block.linear}.weight"])


def fill_gate(recorded, layer, number, name, columns=None):
    hidden, output = recorded.blocks(name)
    recorded.fill_dense(layer.hidden, number, hidden, columns)
    recorded.fill_dense(layer.output_dense, number, output)


def _epnet(recorded):
    name = "gate_nu.dense_layers"
    layer = EPNet(_width(recorded, recorded.blocks(name)[0]))
    y = layer(recorded.inputs["main"], recorded.inputs["domain"])
    fill_gate(recorded, layer.gate, 0, name)
    return y


def _of_tasks(recorded):
    """TorchEasyRec: lists of all layers of all tasks."""
    tasks = len(recorded.arrays_out)
    each = recorded.count("linears.{}") // tasks
    widths = [
        len(recorded.weights[f"linears.{number}.weight"])
        for number in range(each)
    ]
    hidden = _widths_of_gates(recorded, "gate_nus.{}.dense_layers", widths)
    layer = PPNet(tasks, widths, gate_units=hidden)
    y = layer(recorded.inputs["main"], recorded.inputs["uia"])
    for task in range(tasks):
        for number in range(each):
            at = task * each + number
            (block,) = recorded.blocks(f"linears.{at}")
            recorded.fill_dense(layer.layers[number], task, block)
            gate = f"gate_nus.{at}.dense_layers"
            fill_gate(recorded, layer.gates[number], task, gate)
    return {f"y{task}": y[:, task] for task in range(tasks)}


def _widths_of_gates(recorded, pattern, widths):
    """The width of all gates, or `None` if it is that of what they gate."""
    hidden = [
        _width(recorded, recorded.blocks(pattern.format(number))[0])
        for number in range(len(widths))
    ]
    return None if hidden == list(widths) else hidden[0]


def _tower(recorded):
    """FuxiCTR, gates at the outputs, and MMLRec, gates at the inputs."""
    names = set(recorded.inputs) - {"gate_emb"}
    x = recorded.inputs[names.pop()]
    prior = recorded.inputs["gate_emb"]
    gates = recorded.count("gate_layers.{}")
    blocks = recorded.blocks("mlp_layers")
    widths = [_width(recorded, block) for block in blocks]
    at_inputs = gates == len(blocks)
    gated = [x.shape[-1], *widths[:-1]] if at_inputs else widths[:-1]
    layer = PPNet(
        1,
        widths[:-1],
        output_units=widths[-1],
        gate_units=_widths_of_gates(recorded, "gate_layers.{}.gate", gated),
        gate_place="input" if at_inputs else "output",
    )
    y = layer(x, prior)
    for dense, block in zip(layer.layers, blocks, strict=True):
        recorded.fill_dense(dense, 0, block)
    # They read the inputs first, the layer what is known beforehand.
    width, known = x.shape[-1], prior.shape[-1]
    columns = np.roll(np.arange(width + known), known)
    for number, gate in enumerate(layer.gates):
        fill_gate(recorded, gate, 0, f"gate_layers.{number}.gate", columns)
    return y[:, 0]


def _of_domains(recorded):
    """Scenario-Wise-Rec: the towers read what should be for the gates only."""
    x = ops.stop_gradient(recorded.inputs["x"])
    known = ops.concatenate([recorded.inputs["id"], x], axis=1)
    domains = recorded.count("domain_tower.{}")
    networks = [
        [
            block
            for number in range(
                recorded.count(f"domain_tower.{d}.mlp_layers" + ".{}")
            )
            for block in recorded.blocks(
                f"domain_tower.{d}.mlp_layers.{number}"
            )
        ]
        for d in range(domains)
    ]
    layer = PPNet(
        domains,
        [_width(recorded, block) for block in networks[0]],
        output_units=1,
        gate_reads="prior",
        normalization="batch",
        normalization_epsilon=EPSILON,
    )
    y = layer(known, known)
    for d, blocks in enumerate(networks):
        (last,) = recorded.blocks(f"domain_tower.{d}.final_layer")
        for dense, block in zip(layer.layers, [*blocks, last], strict=True):
            recorded.fill_dense(dense, d, block)
        for number, gate in enumerate(layer.gates):
            name = f"domain_tower.{d}.gate_layers.{number}.network"
            fill_gate(recorded, gate, d, name)
    return ops.sigmoid(of_domain(y, recorded.inputs["domain"])[:, 0])
