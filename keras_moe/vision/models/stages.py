"""Stages of a backbone, whose feature maps get smaller from one to the next."""

import keras
from keras import ops

from keras_moe.checks import is_int
from keras_moe.checks import is_number


def check_depths(depths):
    if (
        not isinstance(depths, (list, tuple))
        or not depths
        or not all(is_int(depth) and depth > 0 for depth in depths)
    ):
        raise ValueError(
            "`depths` must be a list of positive ints, the blocks of each "
            f"stage. Received: depths={depths!r}"
        )


def check_mlp_ratio(mlp_ratio, narrowest):
    """Raises unless there is a hidden layer in the narrowest stage, too."""
    if not is_number(mlp_ratio) or int(mlp_ratio * narrowest) < 1:
        raise ValueError(
            "`mlp_ratio` must be a number that gives a hidden layer of one "
            f"unit or more. Received: mlp_ratio={mlp_ratio!r}, a width of "
            f"{narrowest}"
        )


def numbered_blocks(depths):
    """`(stage, number within the stage)` of every block, in their order."""
    return [(s, i) for s, depth in enumerate(depths) for i in range(depth)]


def feature_map(tokens, grid):
    """Tokens `(B, rows * columns, D)` as `(B, rows, columns, D)`."""
    return ops.reshape(tokens, (-1, *grid, tokens.shape[-1]))


def in_format(x, data_format):
    """A map `(B, rows, columns, D)` in a data format."""
    first = data_format == "channels_first"
    return ops.transpose(x, (0, 3, 1, 2)) if first else x


def halved(x, filters, layer_norm_epsilon, dtype, name):
    """A normalized map, convolved to one of half the size."""
    if x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(
            "`image_shape` must give a feature map of even height and width "
            f"where it is halved. Received: a map of {x.shape[1:3]} before "
            f"{name}"
        )
    x = keras.layers.LayerNormalization(
        epsilon=layer_norm_epsilon, dtype=dtype, name=f"{name}_norm"
    )(x)
    return keras.layers.Conv2D(
        filters,
        2,
        strides=2,
        data_format="channels_last",
        dtype=dtype,
        name=name,
    )(x)
