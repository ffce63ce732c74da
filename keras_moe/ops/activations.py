"""Activations that experts of published models use and Keras does not have."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_moe")
class Swish:
    """`x * sigmoid(alpha * x)`.

    With `alpha=1.702` it is the approximation of GELU that gpt-oss uses, for
    which `activation="quick_gelu"` is short.

    Args:
        alpha: float. Defaults to `1.0`, which is `"silu"`.

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


_NAMED = {"quick_gelu": Swish(1.702), "relu_squared": relu_squared}


def get(identifier):
    """`"quick_gelu"`, `"relu_squared"`, or what Keras makes of it."""
    if isinstance(identifier, str) and identifier in _NAMED:
        return _NAMED[identifier]
    return keras.activations.get(identifier)


def serialize(activation):
    for name, function in _NAMED.items():
        if activation is function:
            return name
    return keras.activations.serialize(activation)


def is_pure(activation):
    """Whether it surely has no weights: it is Keras' own or one of these."""
    name = getattr(activation, "__name__", "")
    return (
        type(activation) is Swish
        or activation is relu_squared
        or getattr(keras.activations, name, None) is activation
    )
