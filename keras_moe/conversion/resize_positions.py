import keras

from keras_moe.vision.layers.patch_embedding import PatchEmbedding
from keras_moe.vision.models.image_backbone import ImageBackbone
from keras_moe.vision.models.image_classifier import MoEImageClassifier


def resize_positions(model, image_shape):
    """The same vision model for images of another size.

    Learned positions are resized linearly between the old ones, with the
    corners where they are; the vector of the class token stays. All other
    weights are copied. Positions that are computed need no resizing.

    Args:
        model: A backbone of `keras_moe.models` for images, or a
            `MoEImageClassifier`. It stays as it is.
        image_shape: Three ints, in the order of the model's `data_format`, with
            as many channels as before.

    Returns:
        A new model of the same class.

    Raises:
        ValueError: If `model` is another or has further weights that depend on
            the size (`MixerMoEBackbone`), the patches do not divide the images,
            or the number of channels differs.

    Example:

    >>> backbone = keras_moe.models.SoftMoEBackbone(
    ...     image_shape=(16, 16, 3), patch_size=8, num_layers=2, num_heads=2,
    ...     hidden_dim=8, mlp_dim=16, num_experts=4,
    ... )
    >>> larger = keras_moe.conversion.resize_positions(backbone, (32, 24, 3))
    >>> larger.output_shape
    (None, 12, 8)

    Reference:

    - [Dosovitskiy et al., 2020](https://arxiv.org/abs/2010.11929), section 3.2
    """
    if not isinstance(model, (ImageBackbone, MoEImageClassifier)):
        raise ValueError(
            "`model` must be a vision backbone or a classifier of "
            f"keras_moe.models. Received: model={model!r}"
        )
    config = keras.saving.serialize_keras_object(model)
    backbone = config["config"].get("backbone", config)
    old = backbone["config"]["image_shape"]
    backbone["config"]["image_shape"] = image_shape
    for saved in (config, backbone):
        saved.pop("build_config", None)
        saved.pop("compile_config", None)
    new = keras.saving.deserialize_keras_object(config)
    channels = 0 if _backbone(new).data_format == "channels_first" else -1
    if image_shape[channels] != list(old)[channels]:
        raise ValueError(
            "`image_shape` must have as many channels as before. Received: "
            f"image_shape={image_shape}, before {tuple(old)}"
        )
    _copy(model, new)
    return new


def _backbone(model):
    return getattr(model, "backbone", model)


def _copy(model, new):
    for old_layer, layer in zip(model.layers, new.layers, strict=True):
        if isinstance(layer, ImageBackbone):
            _copy(old_layer, layer)
        elif isinstance(layer, PatchEmbedding) and layer.positions is not None:
            _copy_embedding(old_layer, layer)
        else:
            _check_shapes(old_layer, layer)
            layer.set_weights(old_layer.get_weights())


def _check_shapes(old_layer, layer):
    for old, new in zip(old_layer.weights, layer.weights, strict=True):
        if old.shape != new.shape:
            raise ValueError(
                "`model` must have no weights that fit images of one size "
                f"alone, but for positions. Received: {old.path} of shape "
                f"{tuple(old.shape)}, which would have to be "
                f"{tuple(new.shape)}"
            )


def _copy_embedding(old, new):
    for variable, value in zip(new.weights, old.weights, strict=True):
        if variable is not new.positions:
            variable.assign(value)
    new.assign_positions_of(old)
