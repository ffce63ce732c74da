"""Vectors of places in a grid of patches, in NumPy."""

import numpy as np


def sincos_positions(height, width, dim):
    """Sines and cosines of columns and rows, `(height * width, dim)`.

    The first half tells the column, the second the row. `dim` is a multiple of
    4, as `check_sincos_dim` demands.
    """
    rows, columns = np.mgrid[:height, :width].astype("float64")
    steps = np.arange(dim // 4) / max(dim // 4 - 1, 1)
    frequencies = 10000.0**-steps
    columns = columns.reshape(-1, 1) * frequencies
    rows = rows.reshape(-1, 1) * frequencies
    waves = [np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)]
    return np.concatenate(waves, axis=1).astype("float32")


def check_sincos_dim(dim):
    if dim % 4:
        raise ValueError(
            "`hidden_dim` must be a multiple of 4 with "
            f"`positions='sincos'`. Received: hidden_dim={dim}"
        )


def resized_grid(grid, height, width):
    """A grid `(h, w, D)` linearly resized to `(height, width, D)`.

    The corners stay where they are.
    """
    grid = np.asarray(grid, "float32")
    rows = _interpolation(grid.shape[0], height)
    columns = _interpolation(grid.shape[1], width)
    return np.einsum("ih,jw,hwd->ijd", rows, columns, grid)


def _interpolation(old, new):
    """`(new, old)`: the share of each old place in each new one."""
    at = np.arange(new) * ((old - 1) / max(new - 1, 1))
    low = np.minimum(at.astype(int), max(old - 2, 0))
    shares = np.zeros((new, old), "float32")
    np.add.at(shares, (np.arange(new), low), 1 - (at - low))
    high = np.minimum(low + 1, old - 1)
    np.add.at(shares, (np.arange(new), high), at - low)
    return shares
