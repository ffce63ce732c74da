"""Vision transformers of timm, as classifiers on a backbone of ours."""

import re
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops


class Place(NamedTuple):
    """Where a part of a variable is recorded.

    Fields:
        name: str. The recorded weight.
        index: The part of the variable.
        rows: The part of the recorded weight.
    """

    name: str
    index: Any = ...
    rows: Any = ...


def classifier(backbone, config):
    """A functional model from images, channels last, to classes.

    With the mean over the patches, timm normalizes after it, not before.
    """
    has_token = backbone.use_class_token
    if config.get("global_pool", "token") == "avg":
        last = backbone.get_layer("norm").input
        x = ops.mean(last[:, int(has_token) :], axis=1)
        x = keras.layers.LayerNormalization(epsilon=1e-6, name="fc_norm")(x)
    else:
        x = backbone.output[:, 0]
    x = keras.layers.Dense(config["num_classes"], name="predictions")(x)
    return keras.Model(backbone.input, x)


def arguments(case, config):
    """The arguments of a backbone, but for its experts."""
    if config.get("qk_norm") or config.get("init_values"):
        raise NotImplementedError(f"No layer takes the case with {config}")
    size, patch = config["img_size"], config["patch_size"]
    return {
        "image_shape": (size, size, case.arrays["x"].shape[1]),
        "patch_size": patch,
        "num_layers": config["depth"],
        "num_heads": config["num_heads"],
        "hidden_dim": config["embed_dim"],
        "mlp_dim": round(config["embed_dim"] * config["mlp_ratio"]),
        "activation": "gelu",
        "use_class_token": config.get("class_token", True),
        "qk_norm": False,
        "data_format": "channels_last",
    }


# Our paths and the names of timm, tried in this order.
_NAMES = (
    (r"^patch_embedding/projection/", "patch_embed.proj."),
    (r"^patch_embedding/class_token$", "cls_token"),
    (r"^patch_embedding/positions$", "pos_embed"),
    (r"^predictions/", "head."),
    (r"^block_(\d+)/", r"blocks.\1."),
    (r"attention_norm/", "norm1."),
    (r"feed_forward_norm/", "norm2."),
    (r"attention/attention_output/", "attn.proj."),
    (r"attention/(query|key|value)/", r"attn.qkv."),
    (r"mlp/dense_(\d)/", r"mlp.fc\1."),
    (r"(^|_)norm/", r"\1norm."),
    (r"(kernel|gamma)$", "weight"),
    (r"beta$", "bias"),
)


def place(path):
    """The `Place` of a variable outside the experts."""
    name = path
    for ours, theirs in _NAMES:
        name = re.sub(ours, theirs, name)
    part = re.search("/(query|key|value)/", path)
    if part is None:
        return Place(name)
    return Place(name, rows=("query", "key", "value").index(part[1]))


class Filled:
    """A model with the recorded weights; all of them have a place.

    Args:
        model: A model.
        case: The case.
        places: Function from the path of a variable to a list of `Place`, or
            `None` where `place` knows it.
        layouts: dict of further names, as regular expressions, to functions
            from the recorded layout to that of the variable.
    """

    def __init__(self, model, case, places, layouts):
        self.model = model
        self.layouts = layouts
        self.places = {
            v.path: places(v.path) or [place(v.path)]
            for v in model.trainable_variables
        }
        weights, used = case.under("w/"), set()
        for variable in model.trainable_variables:
            value = np.array(ops.convert_to_numpy(variable.value))
            for where in self.places[variable.path]:
                part = self.part(weights[where.name], where, value)
                value[where.index] = part
                used.add(where.name)
            variable.assign(value)
        if used != set(weights):
            raise ValueError(f"The model has no {set(weights) - used}")

    def part(self, recorded, where, variable):
        """What the recorded array has for the part of a variable."""
        shape = variable[where.index].shape
        if where.rows is not ...:
            recorded = np.split(recorded, 3)[where.rows]
        for pattern, layout in self.layouts.items():
            if re.search(pattern, where.name):
                return np.reshape(layout(recorded), shape)
        if recorded.ndim == 4:  # a convolution's
            recorded = recorded.transpose(2, 3, 1, 0)
        elif recorded.ndim == 2:
            recorded = recorded.T
        return np.reshape(recorded, shape)

    def assert_gradients(self, test, gradients, recorded):
        """Compares gradients by path with recorded ones by name."""
        compared = set()
        for path, places in self.places.items():
            for where in places:
                if where.name not in recorded:
                    continue
                wanted = recorded[where.name]
                scale = np.abs(wanted).max()
                wanted = self.part(wanted, where, gradients[path])
                actual = gradients[path][where.index]
                with test.subTest(where.name):
                    test.assert_relative(actual / scale, wanted / scale)
                compared.add(where.name)
        test.assertEqual(compared, set(recorded))
        test.assertNotEmpty(compared)
