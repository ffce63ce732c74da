"""Finds the feed-forward networks that the layers of a model hold."""

import keras
import numpy as np
from keras import ops

from keras_moe.conversion.dense_network import FeedForward
from keras_moe.conversion.dense_network import TakenBlock
from keras_moe.conversion.dense_network import as_array
from keras_moe.conversion.dense_network import named_activation
from keras_moe.conversion.sublayers import attributes_of
from keras_moe.conversion.sublayers import with_sublayers
from keras_moe.moe.routed_layer import RoutedLayer
from keras_moe.moe.soft_moe import SoftMoE
from keras_moe.ops import activations


def held_feed_forwards(root):
    """The feed-forward networks in a layer that is no graph, in order.

    Returns:
        `(found, looked_at)`: a list of `FeedForward` and `TakenBlock`, and
        lines that say what else was considered.
    """
    found, looked_at, done = [], [], set()
    for owner in with_sublayers(root):
        if id(owner) in done:
            continue
        if isinstance(owner, (RoutedLayer, SoftMoE)):
            done |= {id(part) for part in with_sublayers(owner)}
            found.append(TakenBlock(_label(owner)))
            continue
        networks = [
            network
            for network in (
                _hub_pair(owner),
                *(_whole_layer(owner, *a) for a in attributes_of(owner)),
            )
            if network is not None
        ]
        for network in networks:
            if id(network.up) in done:
                continue
            reason = _why_not(network)
            if reason:
                looked_at.append(f"{network.name}: {reason}")
                continue
            done |= {id(network.up), id(network.down), id(network.gate)}
            found.append(network)
    kinds = sorted({type(part).__name__ for part in with_sublayers(root)})
    looked_at.append(f"{_label(root)} with parts of {', '.join(kinds)}")
    return found, looked_at


def _whole_layer(owner, attribute, layer):
    """A layer that is a feed-forward network, and nothing else."""
    if isinstance(layer, (RoutedLayer, SoftMoE, keras.Model)):
        return None
    parts = with_sublayers(layer)[1:]
    dense = [part for part in parts if type(part) is keras.layers.Dense]
    sizes = sum(len(part.weights) for part in dense)
    if len(dense) not in (2, 3) or sizes != len(layer.weights):
        return None
    where = {
        "name": _label(layer),
        "owner": owner,
        "attribute": attribute,
    }
    rates = _dropouts(layer, parts)
    if len(dense) == 3:
        gate, up, down = dense
        return FeedForward(
            **where,
            gate=gate,
            up=up,
            down=down,
            activation=named_activation(gate.activation),
            **rates,
        )
    up, down = dense
    if up.units == 2 * down.kernel.shape[0]:
        return FeedForward(
            **where,
            gate=up,
            up=up,
            down=down,
            activation=activations.get("silu"),
            **rates,
        )
    activation = up.activation
    for part in parts:
        if isinstance(part, keras.layers.Activation):
            activation = part.activation
    return FeedForward(
        **where,
        up=up,
        down=down,
        activation=named_activation(activation),
        **rates,
    )


def _dropouts(layer, parts):
    """Rates after the hidden layer and after the last one.

    One dropout layer is taken to be used twice, as vision transformers do.
    """
    rates = [p.rate for p in parts if isinstance(p, keras.layers.Dropout)]
    rates = [*rates, *rates][:2] if rates else [0.0, 0.0]
    return {"dropout": rates[0], "output_dropout": rates[1]}


def _hub_pair(owner):
    """Networks that keras-hub spreads over several attributes of a block."""
    parts = dict(attributes_of(owner))
    dense = keras.layers.Dense
    where = {"name": f"the feed-forward of {_label(owner)}", "owner": owner}
    # DeiT: the second layer, dropout and sum are in another layer.
    first, last = parts.get("mlp"), parts.get("output_layer")
    if first is not None and last is not None:
        up, down = (dict(attributes_of(x)).get("dense") for x in (first, last))
        if type(up) is type(down) is dense and len(first.weights) <= 2:
            return FeedForward(
                **where,
                up=up,
                down=down,
                activation=named_activation(up.activation),
                dropout=0.0,
                attribute="mlp",
                removed=((last, "dense"),),
            )
    # CLIP: both layers and the activation are the block's own.
    names = ("dense_1", "activation", "dense_2")
    up, between, down = (parts.get(name) for name in names)
    if (
        type(up) is type(down) is dense
        and isinstance(between, keras.layers.Activation)
        and up.activation is keras.activations.linear
    ):
        return FeedForward(
            **where,
            up=up,
            down=down,
            activation=named_activation(between.activation),
            attribute="dense_1",
            removed=((owner, "activation"), (owner, "dense_2")),
        )
    # TransformerEncoder has no public name for them.
    names = ("_feedforward_intermediate_dense", "_feedforward_output_dense")
    up, down = (parts.get(name) for name in names)
    if type(up) is type(down) is dense:
        return FeedForward(
            **where,
            up=up,
            down=down,
            activation=named_activation(up.activation),
            attribute=names[0],
            removed=((owner, names[1]),),
        )
    return None


def _why_not(network):
    """Why it cannot be replaced, or `None`."""
    if not (network.up.built and network.down.built):
        return "is not built"
    if network.down.activation is not keras.activations.linear:
        return "has an activation after its last layer"
    if network.input_dim != network.output_dim:
        return f"from width {network.input_dim} to {network.output_dim}"
    for layer in (network.up, network.down, network.gate):
        if layer is not None and layer.quantization_mode is not None:
            return "is quantized"
    try:
        shape = (None, 5, network.input_dim)
        given = network.owner.compute_output_shape(shape)
        if tuple(given) != shape:
            return f"{_label(network.owner)} is no block, as it pools"
    except Exception:  # the layer does not say: blocks of keras-hub do not
        pass
    if network.removed:
        return None
    x = np.random.default_rng(0).normal(size=(3, network.input_dim))
    x = x.astype("float32")
    layer = getattr(network.owner, network.attribute)
    try:
        given = as_array(layer(ops.convert_to_tensor(x[None])))[0]
        wanted = network.compute(x)
    except Exception as error:
        return f"cannot be called with tokens alone: {error}"
    exact = keras.backend.standardize_dtype(layer.compute_dtype) == "float32"
    scale = np.abs(wanted).max() + 1e-12
    if np.abs(given - wanted).max() > (1e-4 if exact else 5e-2) * scale:
        return "computes something else than two layers or a gated unit"
    return None


def _label(layer):
    return f"{layer.path or layer.name} ({type(layer).__name__})"
