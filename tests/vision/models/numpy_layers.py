"""Layers of vision models in NumPy and float64, for models by hand."""

import numpy as np


def under(weights, prefix):
    """The weights whose paths begin so, by the rest of their paths."""
    return {
        path.removeprefix(prefix): value
        for path, value in weights.items()
        if path.startswith(prefix)
    }


def normalized(x, weights, epsilon):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    x = (x - mean) / np.sqrt(variance + epsilon)
    return x * weights["gamma"] + weights["beta"]


def mlp(x, weights, activation=np.tanh):
    x = x @ weights["dense_1/kernel"] + weights["dense_1/bias"]
    return activation(x) @ weights["dense_2/kernel"] + weights["dense_2/bias"]


def patches(x, size):
    """`(B, rows, columns, size * size * C)`, one patch after the other."""
    batch, height, width, channels = x.shape
    rows, columns = height // size, width // size
    out = np.zeros((batch, rows, columns, size * size * channels))
    for row in range(rows):
        for column in range(columns):
            top, left = row * size, column * size
            patch = x[:, top : top + size, left : left + size]
            out[:, row, column] = patch.reshape(batch, -1)
    return out


def convolved(x, kernel):
    """Each channel with its own `(side, side)` kernel, zeros around."""
    side = kernel.shape[0]
    before = (side - 1) // 2
    _, height, width, _ = x.shape
    around = ((0, 0), (before, side - 1 - before)) * 2
    x = np.pad(x, (around[0], around[1], around[1], around[0]))
    out = 0.0
    for row in range(side):
        for column in range(side):
            part = x[:, row : row + height, column : column + width]
            out = out + part * kernel[row, column]
    return out
