"""Windows of a grid of tokens: who is in one with whom, in NumPy and tensors.

In the comments, H and W are rows and columns of the grid, filled up to whole
windows, S is the side of a window.
"""

import numpy as np
from keras import ops


def filled_up(grid, size):
    """Rows and columns of the whole windows that cover a grid."""
    return tuple(-(-side // size) * size for side in grid)


def to_windows(x, grid, size, shift):
    """Tokens `(B, rows * columns, D)` to windows `(B, windows, S * S, D)`.

    The grid is filled up with zeros below and on the right, and rolled by
    `shift` up and to the left.
    """
    (rows, columns), (height, width) = grid, filled_up(grid, size)
    dim = x.shape[-1]
    x = ops.reshape(x, (-1, rows, columns, dim))
    if (height, width) != (rows, columns):
        fill = [[0, height - rows], [0, width - columns]]
        x = ops.pad(x, [[0, 0], *fill, [0, 0]])
    if shift:
        x = ops.roll(x, (-shift, -shift), axis=(1, 2))
    x = ops.reshape(
        x, (-1, height // size, size, width // size, size, dim)
    )  # (B, H / S, S, W / S, S, D)
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    number = height * width // size**2
    return ops.reshape(x, (-1, number, size * size, dim))


def from_windows(x, grid, size, shift):
    """The tokens of `to_windows`, without those that filled the grid up."""
    (rows, columns), (height, width) = grid, filled_up(grid, size)
    dim = x.shape[-1]
    x = ops.reshape(
        x, (-1, height // size, width // size, size, size, dim)
    )  # (B, H / S, W / S, S, S, D)
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    x = ops.reshape(x, (-1, height, width, dim))
    if shift:
        x = ops.roll(x, (shift, shift), axis=(1, 2))
    x = x[:, :rows, :columns]
    return ops.reshape(x, (-1, rows * columns, dim))


def visible(grid, size, shift):
    """Which tokens of a window see each other, `(windows, S * S, S * S)`.

    Tokens that were no neighbours before the roll do not, nor does any see what
    fills the grid up. `None` if all of them do.
    """
    (rows, columns), (height, width) = grid, filled_up(grid, size)
    if not shift and (height, width) == (rows, columns):
        return None
    # The window of each place before the roll; from 0, cut off above and left.
    down, right = (
        (np.arange(side) - shift) // size + 1 for side in (height, width)
    )
    region = down[:, None] * (width + 1) + right
    region[rows:] = region[:, columns:] = -1
    region = np.roll(region, (-shift, -shift), (0, 1))
    region = region.reshape(height // size, size, width // size, size)
    region = region.transpose(0, 2, 1, 3).reshape(-1, size * size)
    return region[:, :, None] == region[:, None]


def log_offsets(size, pretrained_size=None):
    """Offsets of two places in a window, log-spaced, `((2 S - 1) ** 2, 2)`.

    They are 1 and -1 for the farthest places of a window of `pretrained_size`,
    `size` by default.
    """
    steps = np.arange(1 - size, size) / max((pretrained_size or size) - 1, 1)
    steps = np.sign(8 * steps) * np.log2(np.abs(8 * steps) + 1) / np.log2(8)
    table = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1)
    return table.reshape(-1, 2).astype("float32")


def offset_indices(size):
    """The place in `log_offsets` of each query and key, `(S ** 4,)`."""
    rows, columns = np.divmod(np.arange(size * size), size)
    down = rows[:, None] - rows + size - 1
    right = columns[:, None] - columns + size - 1
    return (down * (2 * size - 1) + right).reshape(-1).astype("int32")
