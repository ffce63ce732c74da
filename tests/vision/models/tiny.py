"""Small vision models."""

import keras
import numpy as np

from keras_moe.models import DiTMoEBackbone
from keras_moe.models import SoftMoEBackbone
from keras_moe.models import VMoEBackbone

SIZES = {
    "image_shape": (8, 8, 3),
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 12,
    "num_experts": 4,
    "data_format": "channels_last",
}
IMAGES = np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype("float32")


def v_moe(**kwargs):
    return VMoEBackbone(**{**SIZES, "moe_layers": "every_2", **kwargs})


def soft_moe(**kwargs):
    return SoftMoEBackbone(**{**SIZES, "slots_per_expert": 2, **kwargs})


def dit_moe(**kwargs):
    return DiTMoEBackbone(**{**SIZES, "num_classes": 3, **kwargs})


def randomize(model, seed=1):
    """Weights that are all different from zero, so that all of them matter."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * 0.5)
    return model


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)
