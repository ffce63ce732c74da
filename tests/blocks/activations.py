"""Activations of recorded blocks."""

import keras

from keras_moe import experts as experts_lib


def exact_gelu(x):
    return keras.activations.gelu(x, approximate=False)


_ACTIVATIONS = {
    "silu": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
    "gelu": exact_gelu,
    "gelu_tanh": lambda x: keras.activations.gelu(x, approximate=True),
}


def activation(spec):
    name = spec.pop("act")
    limit, alpha = spec.pop("limit", None), spec.pop("alpha", None)
    if name == "swiglu_oai":
        kwargs = {"activation": experts_lib.Swish(alpha), "up_shift": 1.0}
    else:
        kwargs = {"activation": _ACTIVATIONS[name]}
    return kwargs | ({} if limit is None else {"limit": limit})
