"""Stages of a backbone, whose feature maps get smaller from one to the next."""

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


def feature_map(tokens, grid, data_format):
    """Tokens `(B, rows * columns, D)` as a map in a data format."""
    x = ops.reshape(tokens, (-1, *grid, tokens.shape[-1]))
    return (
        ops.transpose(x, (0, 3, 1, 2)) if data_format == "channels_first" else x
    )
