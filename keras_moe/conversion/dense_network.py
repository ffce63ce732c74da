"""A dense feed-forward network in a model, and what it computes."""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe.ops import activations

# Where two activations are compared: also far out, where some have a limit.
_FAR = [8.0, 15.0, 30.0, 100.0, 1000.0]
_POINTS = np.array(
    [*np.linspace(-6, 6, 121), *_FAR, *(-x for x in _FAR)], "float32"
)
# Activations that experts know by name.
_KNOWN = (
    *("linear", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu"),
    *("relu_squared", "relu6", "elu", "selu", "leaky_relu", "tanh"),
    *("sigmoid", "softplus", "softsign", "hard_silu", "mish"),
)


class FeedForward(NamedTuple):
    """A dense feed-forward network, and where experts can stand for it.

    Attributes:
        name: str, for messages.
        up, down: Layers like `keras.layers.Dense`.
        gate: The layer whose output multiplies that of `up`, or `None`. It may
            be `up` itself, if it computes both, the gate first.
        activation: Of the hidden layer, or of the gate.
        dropout, output_dropout: floats. Rates after the hidden layer and after
            the last one.
        owner: The layer that holds it.
        attribute: str. The attribute of `owner` that becomes the experts.
        removed: `(owner, attribute)` of each layer that is then left over.
        between: In a graph, the names of the layers between `up` and `down`.
    """

    name: str
    up: keras.layers.Layer
    down: keras.layers.Layer
    gate: keras.layers.Layer | None = None
    activation: object = None
    dropout: float = 0.0
    output_dropout: float = 0.0
    owner: keras.layers.Layer | None = None
    attribute: str | None = None
    removed: tuple = ()
    between: tuple = ()

    @property
    def input_dim(self):
        return self.up.kernel.shape[0]

    @property
    def output_dim(self):
        return self.down.kernel.shape[1]

    def weights(self):
        """NumPy arrays by the names that banks of experts give them."""
        found = {}
        for name in ("gate", "up", "down"):
            layer = getattr(self, name)
            if layer is not None:
                found[f"{name}_kernel"] = as_array(layer.kernel)
                if layer.bias is not None:
                    found[f"{name}_bias"] = as_array(layer.bias)
        if self.gate is not None and self.gate is self.up:
            for kind in ("kernel", "bias"):
                both = found.get(f"up_{kind}")
                if both is not None:
                    halves = np.split(both, 2, axis=-1)
                    found[f"gate_{kind}"], found[f"up_{kind}"] = halves
        if any(name.endswith("bias") for name in found):
            for name in [n for n in found if n.endswith("kernel")]:
                bias = np.zeros(found[name].shape[1], "float32")
                found.setdefault(name.replace("kernel", "bias"), bias)
        return found

    def compute(self, x):
        """What it gives in inference, of a NumPy array `(N, D)`."""
        w = self.weights()

        def dense(x, name):
            return x @ w[f"{name}_kernel"] + w.get(f"{name}_bias", 0)

        hidden = dense(x, "up" if self.gate is None else "gate")
        hidden = as_array(self.activation(ops.convert_to_tensor(hidden)))
        if self.gate is not None:
            hidden = hidden * dense(x, "up")
        return dense(hidden, "down")


class TakenBlock(NamedTuple):
    """A feed-forward that has experts already."""

    name: str


def named_activation(function):
    """The activation that experts know by a name, if it is one of these."""
    for name in _KNOWN:
        known = activations.get(name)
        if known is function:
            return known
    x = ops.convert_to_tensor(_POINTS)
    try:
        wanted = as_array(function(x))
    except Exception:  # a function of the user's own, which experts may take
        return function
    for name in _KNOWN:
        known = activations.get(name)
        given = as_array(known(x))
        if given.shape == wanted.shape and np.allclose(
            given, wanted, rtol=1e-6, atol=1e-6
        ):
            return known
    return function


def as_array(x):
    return np.array(ops.convert_to_numpy(ops.cast(x, "float32")))
