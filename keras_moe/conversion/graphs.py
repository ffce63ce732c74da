"""Feed-forward networks in the graph of a functional or sequential model.

All of it reads and writes the configuration of the model, which is a list of
layers that name the layers whose outputs they take.
"""

import itertools
from typing import NamedTuple

import keras

from keras_moe.conversion.dense_network import FeedForward
from keras_moe.conversion.dense_network import TakenBlock
from keras_moe.conversion.dense_network import named_activation
from keras_moe.moe.routed_layer import RoutedLayer
from keras_moe.moe.soft_moe import SoftMoE

_LINEAR = keras.activations.linear
_BETWEEN = (
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.Dropout,
    keras.layers.Identity,
)


def is_graph(model):
    """Whether its configuration is that of its layers."""
    return type(model) is keras.Sequential or (
        isinstance(model, keras.Model)
        and type(model).__name__ == "Functional"
        and "layers" in model.get_config()
    )


def pairs_of(model):
    """`(pairs, looked_at)` of a graph.

    Returns:
        A dict of names of first layers to `FeedForward` or `TakenBlock`, and
        lines about dense layers that are no pair.
    """
    wiring = _wiring(model)
    found, looked_at, ended = {}, [], set()
    for layer in model.layers:
        if isinstance(layer, (RoutedLayer, SoftMoE)):
            found[layer.name] = TakenBlock(layer.name)
        elif type(layer) is keras.layers.Dense and layer.name not in ended:
            pair = _pair(model, layer, wiring)
            if isinstance(pair, str):
                looked_at.append(f"{layer.name}: {pair}")
                continue
            found[layer.name] = pair
            ended.add(pair.down.name)
    pairs = [p for p in found.values() if isinstance(p, FeedForward)]
    if any(p.input_dim == p.output_dim for p in pairs):
        # Others are projections, and heads with a hidden layer.
        unwanted = [
            name
            for name, pair in found.items()
            if isinstance(pair, FeedForward)
            and pair.input_dim != pair.output_dim
        ]
    else:
        unwanted = [
            name
            for name, pair in found.items()
            if isinstance(pair, FeedForward)
            and pair.down.name in wiring.outputs
        ]
    for name in unwanted:
        pair = found.pop(name)
        looked_at.append(
            f"{name}: from width {pair.input_dim} to {pair.output_dim}, a head "
            "or a projection"
        )
    return found, looked_at


class _Wiring(NamedTuple):
    """Which layer takes what, by names."""

    followers: dict
    num_inputs: dict
    outputs: set


def _wiring(model):
    config = model.get_config()
    names = [layer["config"]["name"] for layer in config["layers"]]
    if "output_layers" not in config:
        followers = {name: [] for name in names}
        for name, after in itertools.pairwise(names):
            followers[name] = [after]
        return _Wiring(followers, dict.fromkeys(names, 1), set(names[-1:]))
    takes = {
        name: _histories(layer["inbound_nodes"])
        for name, layer in zip(names, config["layers"], strict=True)
    }
    followers = {name: [] for name in names}
    for name, inputs in takes.items():
        for before in inputs:
            followers[before].append(name)
    # One output is written otherwise than several.
    outputs = set(_strings(config["output_layers"])) & set(names)
    num_inputs = {name: len(inputs) for name, inputs in takes.items()}
    return _Wiring(followers, num_inputs, outputs)


def _histories(value):
    """The layers whose outputs a node takes."""
    if isinstance(value, dict):
        if "keras_history" in value:
            return [value["keras_history"][0]]
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [name for part in value for name in _histories(part)]
    return []


def _strings(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [name for part in value for name in _strings(part)]
    return [value] if isinstance(value, str) else []


def _pair(model, first, wiring):
    """A `FeedForward` that begins with a layer, or why there is none."""
    activation, rate, between = first.activation, 0.0, []
    layer = first
    if wiring.num_inputs[first.name] != 1:
        return "is called several times"
    while True:
        after = wiring.followers[layer.name]
        if layer.name in wiring.outputs or len(after) != 1:
            return "no second Dense follows, which alone takes its output"
        if wiring.num_inputs[after[0]] != 1:
            return f"{after[0]} follows, which takes several inputs"
        try:
            layer = model.get_layer(after[0])
        except ValueError:  # an operation such as `keras.ops.relu`
            return f"{after[0]} follows, not a second Dense"
        if type(layer) is keras.layers.Dense:
            break
        between.append(layer.name)
        is_activation = isinstance(
            layer, (keras.layers.Activation, keras.layers.ReLU)
        )
        if not isinstance(layer, _BETWEEN) or (
            is_activation and (rate or activation is not _LINEAR)
        ):
            kind = type(layer).__name__
            return f"{layer.name} ({kind}) follows, not a second Dense"
        if isinstance(layer, keras.layers.Activation):
            activation = layer.activation
        elif is_activation:
            activation = layer
        elif isinstance(layer, keras.layers.Dropout):
            rate += layer.rate * (1 - rate)
    if first.quantization_mode or layer.quantization_mode:
        return "is quantized"
    activation = named_activation(activation)
    if isinstance(activation, keras.layers.Layer):
        return f"{activation.name} is an activation that experts do not have"
    return FeedForward(
        first.name,
        up=first,
        down=layer,
        activation=activation,
        dropout=rate,
        between=tuple(between),
    )


def with_layers(model, replaced, pairs):
    """A new graph, without weights, in which layers are replaced.

    Args:
        model: A functional or sequential model.
        replaced: dict of names to layers: experts for the first layer of a
            pair, or another layer for any layer.
        pairs: dict of names to the `FeedForward` that begin with them.
    """
    config = model.get_config()
    renamed, gone = {}, set()
    entries = {entry["config"]["name"]: entry for entry in config["layers"]}
    for name, layer in replaced.items():
        _put(entries[name], layer)
        if name not in pairs:
            continue
        pair = pairs[name]
        removed = list(pair.between)
        if pair.down.activation is _LINEAR:
            removed.append(pair.down.name)
        else:
            after = keras.layers.Activation(
                pair.down.activation,
                dtype=pair.down.dtype_policy,
                name=pair.down.name,
            )
            _put(entries[pair.down.name], after)
        gone.update(removed)
        renamed.update(dict.fromkeys(removed, layer.name))
        renamed[name] = layer.name
    config["layers"] = [
        entry for name, entry in entries.items() if name not in gone
    ]
    for key in ("layers", "output_layers", "input_layers"):
        if key in config:
            config[key] = _renamed(config[key], renamed)
    config.pop("build_input_shape", None)
    new = type(model).from_config(config)
    if not new.built:
        new.build(model.input_shape)
    return new


def _put(entry, layer):
    saved = keras.saving.serialize_keras_object(layer)
    saved.pop("build_config", None)
    entry.pop("build_config", None)
    entry.update(saved)
    if "name" in entry:
        entry["name"] = layer.name


def _renamed(value, names):
    """The same with the layers that others refer to renamed."""
    if isinstance(value, dict):
        if "keras_history" in value:
            first, *rest = value["keras_history"]
            return {**value, "keras_history": [names.get(first, first), *rest]}
        return {
            key: part
            if key in ("config", "build_config") and "inbound_nodes" in value
            else _renamed(part, names)
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        if len(value) == 3 and list(value[1:]) == [0, 0]:
            if isinstance(value[0], str):  # an output of the model
                return [names.get(value[0], value[0]), 0, 0]
        return [_renamed(part, names) for part in value]
    return value
