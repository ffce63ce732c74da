"""Puts recorded weights of PyTorch's layers into those of the library."""

import numpy as np


def put_dense(recorded, layer, name):
    """A linear layer, `(outputs, inputs)`."""
    put_kernel(recorded, layer.kernel, f"{name}.weight")
    if recorded.has(f"{name}.bias"):
        recorded.put(layer.bias, f"{name}.bias")


def put_kernel(recorded, kernel, name, index=...):
    recorded.put(kernel, name, index, np.transpose, np.transpose)


def put_norm(recorded, layer, name):
    recorded.put(layer.gamma, f"{name}.weight")
    recorded.put(layer.beta, f"{name}.bias")


def put_patches(recorded, layer, name):
    """A convolution that does not overlap, `(D, channels, height, width)`."""
    shape = recorded.weights[f"{name}.weight"].shape
    dim, channels, height, width = shape

    def to(value):
        return value.transpose(2, 3, 1, 0).reshape(-1, dim)

    def back(gradient):
        gradient = gradient.reshape(height, width, channels, dim)
        return gradient.transpose(3, 2, 0, 1)

    recorded.put(layer.projection.kernel, f"{name}.weight", to=to, back=back)
    recorded.put(layer.projection.bias, f"{name}.bias")


def put_attention(recorded, layer, name):
    """timm's attention: queries, keys and values side by side in `qkv`."""
    dim = recorded.weights[f"{name}.qkv.weight"].shape[1]
    projections = (layer.query_dense, layer.key_dense, layer.value_dense)
    for number, dense in enumerate(projections):
        put_part(recorded, dense, f"{name}.qkv", number, dim)

    recorded.put(
        layer.output_dense.kernel,
        f"{name}.proj.weight",
        to=lambda value: value.T.reshape(layer.output_dense.kernel.shape),
        back=lambda gradient: gradient.reshape(-1, dim).T,
    )
    recorded.put(layer.output_dense.bias, f"{name}.proj.bias")


def put_part(recorded, dense, name, number, dim):
    """Rows `number * width` and on, of three times `width` of them."""
    width = len(recorded.weights[f"{name}.weight"]) // 3
    rows = slice(number * width, (number + 1) * width)

    def padded(gradient):
        whole = np.zeros((3 * width, *gradient.shape[1:]), gradient.dtype)
        whole[rows] = gradient
        return whole

    recorded.put(
        dense.kernel,
        f"{name}.weight",
        to=lambda value: value[rows].T.reshape(dense.kernel.shape),
        back=lambda gradient: padded(gradient.reshape(dim, width).T),
    )
    if recorded.has(f"{name}.bias"):
        recorded.put(
            dense.bias,
            f"{name}.bias",
            to=lambda value: value[rows].reshape(dense.bias.shape),
            back=lambda gradient: padded(gradient.reshape(-1)),
        )
