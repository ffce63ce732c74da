import keras

from keras_moe.moe.model_config import deserialized
from keras_moe.moe.model_config import made_again
from keras_moe.moe.model_config import settings_of
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.models.presets import Presets
from keras_moe.vision.models.presets import save_task
from keras_moe.vision.models.presets import saved_task


class BlockModel(Presets, keras.Model):
    """Base of functional models of numbered blocks, made of flat arguments.

    Args:
        arguments: dict. The arguments of the subclass's constructor, which are
            saved, with `dtype` a dtype policy and `data_format` a string.
        inputs, outputs, name, trainable: As for `keras.Model`.
    """

    def __init__(self, arguments, inputs, outputs, *, name, trainable=True):
        super().__init__(
            inputs=inputs, outputs=outputs, name=name, trainable=trainable
        )
        arguments = lists_of(arguments)
        self.data_format = arguments["data_format"]
        # Functions, since Keras would save plain attributes.
        self._arguments = lambda: dict(arguments)
        self.dtype_policy = arguments["dtype"]

    @property
    def num_blocks(self):
        """How many blocks there are."""
        return sum(layer.name.startswith("block_") for layer in self.layers)

    @property
    def moe_blocks(self):
        """The numbers of the blocks with experts."""
        return [
            i
            for i in range(self.num_blocks)
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


class ImageBackbone(BlockModel):
    """Base of the backbones of classifiers, to tokens or a feature map.

    What a subclass offers to a classifier, it says in attributes:

    - `use_class_token`: whether the first of the tokens is a class token.
    - `ensemble_size`: how many outputs there are for each image, if several.
    - `pooled_norm_epsilon`: epsilon of a layer norm of the mean of a feature
      map, or `None` for none.
    - `pooling_arguments`: dict of arguments of
      `keras_moe.layers.AttentionPooling`, or `None` if that is not for it.
    """

    use_class_token = False
    ensemble_size = 1
    pooled_norm_epsilon = None
    pooling_arguments = None


class BackboneTask(Presets):
    """Mixin of models on a backbone, which is their first argument.

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
                backbone, at least those that have no default, such as
                `num_classes`. With a `num_classes`, the head of a saved
                classifier is a new one.

        Raises:
            ValueError: If there is no such preset, or it is of another class.
        """
        for backbone_class in subclasses_of(cls.backbone_class):
            if str(preset) in backbone_class.presets:
                return cls(backbone_class.from_preset(preset), **kwargs)
        model = saved_task(preset, cls, load_weights, kwargs)
        if model is not None:
            return model
        if issubclass(cls.saved_class(preset), BlockModel):
            backbone = cls.backbone_class.from_preset(preset, load_weights)
            return cls(backbone, **kwargs)
        return super().from_preset(preset, load_weights, **kwargs)

    def save_to_preset(self, folder):
        """Writes the configuration and the weights to a folder.

        The backbone has files of its own, as keras-hub writes them: the folder
        is a preset of it too.

        Args:
            folder: str or path. It is made if it is not there.
        """
        save_task(self, folder)

    def check_backbone(self, backbone):
        if not isinstance(backbone, self.backbone_class):
            raise ValueError(
                f"`backbone` must be a {self.backbone_class.__name__}. "
                f"Received: backbone={backbone!r}"
            )


def subclasses_of(backbone_class):
    """The class, its subclasses and theirs."""
    found = [backbone_class]
    for subclass in backbone_class.__subclasses__():
        found += subclasses_of(subclass)
    return found


def lists_of(arguments):
    """Lists for tuples, as they are after loading."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in arguments.items()
    }


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
