"""Recorded weights, and the public layers that are filled with them."""

import re
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe.layers import MultiGateMoE
from keras_moe.layers import StackedMLP

EPSILON = 1e-5  # of every recorded normalization


class Block(NamedTuple):
    """One layer of a recorded network: the names of what belongs to it."""

    linear: str
    norm: str | None = None
    bias: str | None = None


class Recorded:
    """The arrays of a case, and which variable holds which of them."""

    def __init__(self, arrays):
        def under(folder):
            return {
                name.split("/", 1)[1]: value
                for name, value in arrays.items()
                if name.startswith(f"{folder}/")
            }

        self.weights = under("w")
        self.statistics = under("buf")
        self.arrays_in = under("in")
        self.arrays_out = under("out")
        self.inputs = {
            name: keras.Input(
                value.shape[1:],
                name=name,
                dtype="int32" if value.dtype.kind == "i" else "float32",
            )
            for name, value in self.arrays_in.items()
        }
        self.places = []  # (recorded name, variable, index, back)
        self.gates = []  # (tensor, the experts of the logits of each gate)

    def has(self, name):
        return any(
            key == name or key.startswith(f"{name}.") for key in self.weights
        )

    def count(self, pattern):
        """How many of `pattern.format(0)`, `pattern.format(1)`, ... exist."""
        number = 0
        while self.has(pattern.format(number)):
            number += 1
        return number

    def put(self, variable, name, index=..., to=None, back=None):
        """Puts a recorded weight into a part of a variable.

        `to` makes the layout of the variable of the recorded one, and `back`
        the recorded one of a gradient.
        """
        value = self.weights[name]
        self.assign(variable, value if to is None else to(value), index)
        self.places.append((name, variable, index, back))

    def assign(self, variable, value, index=...):
        whole = np.array(ops.convert_to_numpy(variable.value))
        whole[index] = value
        variable.assign(whole)

    def gradients(self, by_path):
        """The gradients of the recorded weights, from those of variables."""
        found = {}
        for name, variable, index, back in self.places:
            gradient = by_path[variable.path][index]
            gradient = gradient if back is None else back(gradient)
            found[name] = found.get(name, 0.0) + np.asarray(gradient)
        return found

    def blocks(self, prefix):
        """The layers of a network, in the order of their numbers."""
        names = {
            key.rsplit(".", 1)[0]
            for key in self.weights
            if key.startswith(f"{prefix}.")
        }
        blocks = []
        for name in sorted(names, key=_natural):
            if self.weights[f"{name}.weight"].ndim == 1:
                blocks[-1] = blocks[-1]._replace(norm=name)
            else:
                bias = f"{name}.bias" if self.has(f"{name}.bias") else None
                blocks.append(Block(name, bias=bias))
        return blocks

    def dense(self, x, name, bias=None):
        """A recorded linear layer, as a `keras.layers.Dense`."""
        weight = self.weights[f"{name}.weight"]
        bias = bias or (f"{name}.bias" if self.has(f"{name}.bias") else None)
        layer = keras.layers.Dense(len(weight), use_bias=bias is not None)
        y = layer(x)
        self.put(
            layer.kernel, f"{name}.weight", to=np.transpose, back=np.transpose
        )
        if bias:
            self.put(layer.bias, bias)
        return y

    def embedding(self, ids, name):
        rows, width = self.weights[name].shape
        layer = keras.layers.Embedding(rows, width)
        y = layer(ids)
        self.put(layer.embeddings, name)
        return y

    def fill_dense(self, layer, number, block, columns=None):
        """Fills network `number` of a `StackedDense`."""

        def to(weight):
            return (weight if columns is None else weight[:, columns]).T

        def back(gradient):
            gradient = gradient.T
            if columns is None:
                return gradient
            return gradient[:, np.argsort(columns)]

        self.put(layer.kernel, f"{block.linear}.weight", number, to, back)
        if block.bias:
            self.put(layer.bias, block.bias, number)
        if block.norm:
            if layer.normalization == "layer":
                self.put(layer.gamma, f"{block.norm}.weight", number)
                self.put(layer.beta, f"{block.norm}.bias", number)
            else:
                units = layer.units
                part = slice(number * units, (number + 1) * units)
                self.fill_batch_norm(layer._normalize, block.norm, part)

    def fill_batch_norm(self, layer, name, index):
        self.put(layer.gamma, f"{name}.weight", index)
        self.put(layer.beta, f"{name}.bias", index)
        for variable, key in (
            (layer.moving_mean, "running_mean"),
            (layer.moving_variance, "running_var"),
        ):
            self.assign(variable, self.statistics[f"{name}.{key}"], index)

    def normalization(self, blocks):
        norm = blocks[0].norm
        if norm is None:
            return None
        is_batch = f"{norm}.running_mean" in self.statistics
        return "batch" if is_batch else "layer"

    def networks(self, x, networks, linear_last=False, activation="relu"):
        """Networks side by side, `(B, number, width)`, as a `StackedMLP`.

        `networks` are prefixes, or lists of blocks.
        """
        stacks = [
            self.blocks(network) if isinstance(network, str) else network
            for network in networks
        ]
        widths = [len(self.weights[f"{b.linear}.weight"]) for b in stacks[0]]
        layer = StackedMLP(
            len(stacks),
            widths[:-1] if linear_last else widths,
            output_units=widths[-1] if linear_last else None,
            activation=activation,
            use_bias=stacks[0][0].bias is not None,
            output_use_bias=stacks[0][-1].bias is not None,
            normalization=self.normalization(stacks[0]),
            normalization_epsilon=EPSILON,
        )
        y = layer(x)
        self.fill_networks(layer, stacks)
        return y

    def fill_networks(self, layer, stacks):
        for number, blocks in enumerate(stacks):
            for dense, block in zip(layer.layers, blocks, strict=True):
                self.fill_dense(dense, number, block)

    def network(self, x, network, **kwargs):
        return self.networks(x, [network], **kwargs)[:, 0]

    def moe(self, x, num_tasks, experts, gates, orders=None, **kwargs):
        """A `MultiGateMoE` with recorded experts and gates.

        Args:
            x: Its inputs.
            num_tasks: int.
            experts: A list of prefixes for each unit, the shared unit last.
            gates: For each gate a prefix, or a list of blocks.
            orders: For each gate the experts of its logits, if these are not
                in the order of the layer.
            **kwargs: Arguments of the layer, and `gate_inputs`.
        """
        call = {}
        if "gate_inputs" in kwargs:
            call["gate_inputs"] = kwargs.pop("gate_inputs")
        stacks = [self.blocks(prefix) for unit in experts for prefix in unit]
        logits = [
            self.blocks(gate) if isinstance(gate, str) else gate
            for gate in gates
        ]
        if stacks:
            widths = [
                len(self.weights[f"{b.linear}.weight"]) for b in stacks[0]
            ]
            kwargs = {
                "expert_units": widths,
                "expert_normalization": self.normalization(stacks[0]),
                "num_task_experts": [len(unit) for unit in experts[:-1]],
                "num_shared_experts": len(experts[-1]),
                **kwargs,
            }
        selects = kwargs.get("gate_activation") == "dselect_k"
        if not selects:
            kwargs["gate_units"] = [
                len(self.weights[f"{b.linear}.weight"]) for b in logits[0][:-1]
            ]
            kwargs["gate_use_bias"] = logits[0][-1].bias is not None
            if logits[0][-1].norm:
                kwargs["gate_normalization"] = "batch"
        layer = MultiGateMoE(
            num_tasks,
            normalization_epsilon=EPSILON,
            return_gates=True,
            **kwargs,
        )
        y, weights = layer(x, **call)
        if orders is None:
            orders = [np.flatnonzero(row) for row in layer.units.visible]
        self.gates.append((weights, orders))
        if stacks:
            self.fill_networks(layer.experts, stacks)
        if not selects:
            self.fill_gates(layer.task_gates, logits, orders)
        return y, layer

    def fill_gates(self, gates, networks, orders):
        start = 0
        for number, blocks in enumerate(networks):
            seen = np.flatnonzero(gates.visible[number])
            rows = start + np.searchsorted(seen, orders[number])
            start += len(seen)
            for dense, block in zip(
                gates.mlp.layers if gates.mlp else [], blocks[:-1], strict=True
            ):
                self.fill_dense(dense, number, block)
            last = blocks[-1]
            self.put(gates.kernel, f"{last.linear}.weight", rows)
            if last.bias:
                self.put(gates.bias, last.bias, rows)
            if last.norm:
                self.fill_batch_norm(gates._normalize, last.norm, rows)


def _natural(name):
    return [
        int(part) if part.isdigit() else part
        for part in re.split(r"(\d+)", name)
    ]


class Trunk(keras.Model):
    """A functional model that knows what it was filled with."""

    def recorded_gradients(self, by_path):
        """Gradients by recorded name, from those of variables by path."""
        return self.recorded.gradients(by_path)

    def recorded_gates(self, inputs):
        """By level and gate, the weights of the experts that the gate sees."""
        gates = self.recorded.gates
        tensors = {
            str(level): tensor for level, (tensor, _) in enumerate(gates)
        }
        found = {}
        if tensors:
            outputs = keras.Model(self.recorded.inputs, tensors)(inputs)
            for level, (_, orders) in enumerate(gates):
                weights = ops.convert_to_numpy(outputs[str(level)])
                for gate, order in enumerate(orders):
                    found[level, gate] = weights[:, gate, order]
        return found
