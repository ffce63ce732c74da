"""Activations of published experts that Keras does not have."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_moe")
class Swish:
    """`x * sigmoid(alpha * x)`.

    With `alpha=1.702` it approximates GELU, as in gpt-oss. The name
    `"quick_gelu"` stands for this.

    Args:
        alpha: float. Factor inside the sigmoid. Defaults to `1.0`, the same as
            `"silu"`.

    Example:

    >>> swish = keras_moe.experts.Swish(alpha=1.702)
    >>> experts = keras_moe.experts.GLUExperts(2, 8, activation=swish)

    Reference:

    - [Ramachandran et al., 2017](https://arxiv.org/abs/1710.05941), section 4
    - [Hendrycks & Gimpel, 2016](https://arxiv.org/abs/1606.08415), section 2
    """

    def __init__(self, alpha=1.0):
        self.alpha = alpha

    def __call__(self, x):
        return x * ops.sigmoid(self.alpha * x)

    def get_config(self):
        return {"alpha": self.alpha}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def relu_squared(x):
    """`relu(x) ** 2` (Primer, Nemotron)."""
    return ops.square(ops.relu(x))


def gelu_tanh(x):
    """GELU, its normal distribution approximated by a tanh (V-MoE, GPT-2)."""
    return ops.gelu(x, approximate=True)


_NAMED = {
    "gelu_tanh": gelu_tanh,
    "quick_gelu": Swish(1.702),
    "relu_squared": relu_squared,
}

# Activations of Keras that look at several entries.
_OVER_AN_AXIS = ("glu", "log_softmax", "softmax", "sparsemax")


def get(identifier):
    """The activation of a name here, or what Keras finds for it."""
    if isinstance(identifier, str) and identifier in _NAMED:
        return _NAMED[identifier]
    return keras.activations.get(identifier)


def serialize(activation):
    for name, function in _NAMED.items():
        if activation is function:
            return name
    return keras.activations.serialize(activation)


def is_elementwise(activation):
    """Whether each entry is known to depend on its own input alone."""
    name = getattr(activation, "__name__", "")
    return is_pure(activation) and name not in _OVER_AN_AXIS


def is_pure(activation):
    """Whether the activation is known to have no weights."""
    name = getattr(activation, "__name__", "")
    return (
        type(activation) is Swish
        or activation in (gelu_tanh, relu_squared)
        or getattr(keras.activations, name, None) is activation
    )
