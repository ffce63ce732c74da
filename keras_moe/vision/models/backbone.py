"""What all backbones have: numbered blocks, and arguments that are saved."""

import keras

from keras_moe.checks import check_int
from keras_moe.checks import check_rate
from keras_moe.moe.model_config import deserialized
from keras_moe.moe.model_config import made_again
from keras_moe.moe.model_config import settings_of
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.models.presets import Presets


class Backbone(Presets, keras.Model):
    """Base of functional models of blocks, made of flat arguments.

    Args:
        arguments: dict. The arguments of the subclass's constructor, as
            `as_arguments` gives them.
        inputs, outputs: As for `keras.Model`.
        name, trainable: As for `keras.Model`.
    """

    def __init__(self, arguments, inputs, outputs, *, name, trainable=True):
        super().__init__(
            inputs=inputs, outputs=outputs, name=name, trainable=trainable
        )
        # A function, since Keras would save a plain attribute.
        self._arguments = lambda: dict(arguments)
        self.data_format = arguments["data_format"]
        self.dtype_policy = arguments["dtype"]

    @property
    def moe_blocks(self):
        """The numbers of the blocks with experts."""
        return [
            i
            for i in range(self._arguments()["num_layers"])
            if not isinstance(self.block(i).feed_forward, VisionMLP)
        ]

    def block(self, index):
        """The block of a number, from 0."""
        return self.get_layer(f"block_{index}")

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            **frozen_parts(self),
            **self._arguments(),
            "dtype": keras.dtype_policies.serialize(self._arguments()["dtype"]),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return made_again(cls, *deserialized(config, custom_objects))


class BackboneTask(Presets):
    """Mixin of models on a backbone, their first argument.

    A subclass has `backbone_class`, and the backbone's `presets`.
    """

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """A model from a folder, or a new one on a preset's backbone.

        Args:
            preset: str or path. A folder that `save_to_preset` wrote, of such a
                model or a backbone, or the name of a backbone's preset.
            load_weights: bool. Whether to read the weights of the folder.
                Defaults to `True`.
            **kwargs: Arguments of the constructor; where the preset is a
                backbone, at least those that have no default.

        Raises:
            ValueError: If there is no such preset, or it is of another class.
        """
        for backbone_class in _with_subclasses(cls.backbone_class):
            if str(preset) in backbone_class.presets:
                return cls(backbone_class.from_preset(preset), **kwargs)
        if issubclass(cls.saved_class(preset), Backbone):
            backbone = cls.backbone_class.from_preset(preset, load_weights)
            return cls(backbone, **kwargs)
        return super().from_preset(preset, load_weights, **kwargs)

    def check_backbone(self, backbone):
        if not isinstance(backbone, self.backbone_class):
            raise ValueError(
                f"`backbone` must be a {self.backbone_class.__name__}. "
                f"Received: backbone={backbone!r}"
            )


def _with_subclasses(backbone_class):
    return [backbone_class, *backbone_class.__subclasses__()]


def as_arguments(arguments):
    """The arguments of a transformer: checked, with lists as after loading."""
    a = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in arguments.items()
    }
    a["dtype"] = as_dtype(a["dtype"])
    for key in ("num_layers", "num_heads", "hidden_dim", "mlp_dim"):
        check_int(key, a[key], 1)
    for key in ("dropout", "attention_dropout", "drop_path"):
        check_rate(key, a[key])
    if a["hidden_dim"] % a["num_heads"]:
        raise ValueError(
            "`num_heads` must divide `hidden_dim`. Received: "
            f"num_heads={a['num_heads']}, hidden_dim={a['hidden_dim']}"
        )
    return a


def frozen_parts(model):
    """The frozen layers and weights; the dtype is an argument."""
    settings = settings_of(model)
    del settings["dtype_policy"]
    return settings


def as_dtype(dtype):
    """A dtype policy, from what a layer takes as `dtype`."""
    if dtype is None:
        return keras.config.dtype_policy()
    return keras.dtype_policies.get(dtype)


def as_image_shape(image_shape):
    if (
        not isinstance(image_shape, (list, tuple))
        or len(image_shape) != 3
        or not all(isinstance(i, int) and i > 0 for i in image_shape)
    ):
        raise ValueError(
            "`image_shape` must be three positive ints. "
            f"Received: image_shape={image_shape!r}"
        )
    return tuple(image_shape)


def drop_path_of(arguments, block):
    """Deeper blocks are left out more often."""
    last = max(arguments["num_layers"] - 1, 1)
    return arguments["drop_path"] * block / last
