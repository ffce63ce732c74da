"""From raw images to the backbone, and from its outputs to one vector."""

import keras
from keras import ops

from keras_moe.checks import check_one_of
from keras_moe.vision.layers.attention_pooling import AttentionPooling

POOLINGS = ("token", "gap", "map")


def raw_images(preprocessor, inputs):
    """The backbone's inputs, and inputs with raw images in their place."""
    images, *others = inputs
    shape = list(images.shape[1:])
    if getattr(preprocessor, "image_size", None) is not None:
        first = preprocessor.data_format == "channels_first"
        shape[1 if first else 0] = shape[2 if first else 1] = None
    raw = keras.Input(shape, name="images")
    made = preprocessor(raw)
    if tuple(made.shape) != tuple(images.shape):
        raise ValueError(
            "`preprocessor` must make images of shape "
            f"{tuple(images.shape[1:])} for the backbone. Received: "
            f"preprocessor={preprocessor!r}, which makes "
            f"{tuple(made.shape[1:])}"
        )
    return [made, *others], [raw, *others]


def one_or_more(inputs):
    return inputs[0] if len(inputs) == 1 else inputs


def check_pooling(pooling, backbone):
    check_one_of("pooling", pooling, POOLINGS)
    if pooling == "token" and not backbone.use_class_token:
        raise ValueError(
            "`pooling='token'` needs a backbone with a class token. "
            "Received: a backbone with use_class_token=False"
        )
    if pooling == "map" and backbone.pooling_arguments is None:
        raise ValueError(
            "`pooling='map'` needs a backbone with attention over all tokens. "
            f"Received: backbone={backbone!r}"
        )


def pooled(backbone, x, pooling, dtype):
    if pooling == "token":
        return x[:, 0]
    if pooling == "map":
        return AttentionPooling(
            **backbone.pooling_arguments, dtype=dtype, name="pooling"
        )(x)
    if len(x.shape) == 3:
        return ops.mean(x[:, int(backbone.use_class_token) :], axis=1)
    first = backbone.data_format == "channels_first"
    x = ops.mean(x, axis=(2, 3) if first else (1, 2))
    if backbone.pooled_norm_epsilon is None:
        return x
    return keras.layers.LayerNormalization(
        epsilon=backbone.pooled_norm_epsilon, dtype=dtype, name="pooled_norm"
    )(x)
