"""Parts of vision transformers of PyTorch, filled with recorded weights."""

import keras
import numpy as np
from keras import ops

from keras_moe.layers import EncoderBlock
from keras_moe.layers import PatchEmbedding
from keras_moe.vision.layers.attention import VisionAttention
from keras_moe.vision.layers.attention import VisionMLP


class Learned(keras.layers.Layer):
    """A weight that is added to tokens, multiplies them, or stands before."""

    def __init__(self, shape, how, **kwargs):
        super().__init__(**kwargs)
        self.shape_of_weight = list(shape)
        self.how = how

    def build(self, input_shape):
        self.weight = self.add_weight(
            name="weight", shape=tuple(self.shape_of_weight)
        )

    def call(self, x):
        if self.how == "add":
            return x + self.weight
        if self.how == "multiply":
            return x * self.weight
        shape = (ops.shape(x)[0], *self.weight.shape[1:])
        return ops.concatenate(
            [ops.broadcast_to(self.weight, shape), x], axis=1
        )

    def get_config(self):
        return {
            **super().get_config(),
            "shape": self.shape_of_weight,
            "how": self.how,
        }


class CenteredAttention(VisionAttention):
    """With a bias in the norms of queries and keys."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.query_norm, self.key_norm = (
            keras.layers.LayerNormalization(
                epsilon=self.qk_norm_epsilon, name=name
            )
            for name in ("query_norm", "key_norm")
        )


class FeedForwardOf(keras.layers.Layer):
    """What the feed-forward of a block reads and gives."""

    def __init__(self, block, **kwargs):
        super().__init__(**kwargs)
        self.block = block

    def call(self, x):
        y = self.block.attention_norm(x)
        y = self.block.feed_forward_norm(x + self.block.attention(y, y))
        return y, self.block.feed_forward(y)


def learned(recorded, x, name, how, shape=None):
    value = recorded.weights[name]
    shape = shape or value.shape
    layer = Learned(shape, how)
    y = layer(x)
    recorded.put(
        layer.weight,
        name,
        to=lambda w: w.reshape(shape),
        back=lambda g: g.reshape(value.shape),
    )
    return y


def patch_embedding(recorded, x, name, positions, token=None):
    """Tokens of images with channels last, by a convolution's weights.

    Args:
        recorded: A `Recorded`.
        x: `(B, height, width, channels)`.
        name: str. Of the convolution.
        positions: The name of the positions, or `None`; or their values, for
            images of another size.
        token: The name of the class token, or `None`.
    """
    weight = recorded.weights[f"{name}.weight"]
    dim, channels, height, width = weight.shape
    layer = PatchEmbedding(
        dim,
        (height, width),
        use_class_token=token is not None,
        positions=None if positions is None else "learned",
        use_bias=recorded.has(f"{name}.bias"),
        data_format="channels_last",
    )
    y = layer(x)
    recorded.put(
        layer.projection.kernel,
        f"{name}.weight",
        to=lambda w: w.transpose(2, 3, 1, 0).reshape(-1, dim),
        back=lambda g: g.reshape(height, width, channels, dim).transpose(
            3, 2, 0, 1
        ),
    )
    if layer.projection.use_bias:
        recorded.put(layer.projection.bias, f"{name}.bias")
    if token is not None:
        shape = recorded.weights[token].shape
        recorded.put(
            layer.class_token,
            token,
            to=lambda w: w.reshape(1, 1, -1),
            back=lambda g: g.reshape(shape),
        )
    if isinstance(positions, str):
        original = recorded.weights[positions].shape
        recorded.put(
            layer.positions,
            positions,
            to=lambda w: w.reshape(layer.positions.shape),
            back=lambda g: g.reshape(original),
        )
    elif positions is not None:
        layer.positions.assign(positions)
    return y


def fill_norm(recorded, layer, name):
    recorded.put(layer.gamma, f"{name}.weight")
    if layer.beta is not None and recorded.has(f"{name}.bias"):
        recorded.put(layer.beta, f"{name}.bias")


def norm(recorded, x, name, epsilon):
    layer = keras.layers.LayerNormalization(epsilon=epsilon)
    y = layer(x)
    fill_norm(recorded, layer, name)
    return y


def fill_dense(recorded, layer, name):
    to = np.transpose
    recorded.put(layer.kernel, f"{name}.weight", to=to, back=to)
    if layer.bias is not None:
        recorded.put(layer.bias, f"{name}.bias")


def fill_attention(recorded, layer, name):
    """Fills `VisionAttention`, from three matrices or one for all three."""
    packed = [
        start
        for start in ("qkv.", "in_proj_")
        if f"{name}.{start}weight" in recorded.weights
    ]
    for i, letter in enumerate("qkv"):
        dense = (layer.query_dense, layer.key_dense, layer.value_dense)[i]
        for part in ("weight", "bias"):
            variable = dense.kernel if part == "weight" else dense.bias
            start = packed[0] if packed else f"{letter}_proj."
            if f"{name}.{start}{part}" in recorded.weights:
                number = i if packed else None
                _put_rows(recorded, variable, f"{name}.{start}{part}", number)
    out = next(
        f"{name}.{key}"
        for key in ("proj", "o_proj", "out_proj")
        if recorded.has(f"{name}.{key}")
    )
    kernel = layer.output_dense.kernel
    shape = recorded.weights[f"{out}.weight"].shape
    recorded.put(
        kernel,
        f"{out}.weight",
        to=lambda w: w.T.reshape(kernel.shape),
        back=lambda g: g.reshape(shape[::-1]).T,
    )
    if recorded.has(f"{out}.bias"):
        recorded.put(layer.output_dense.bias, f"{out}.bias")


def _put_rows(recorded, variable, name, number):
    """A third of the rows of a recorded weight, or all of them."""
    whole = recorded.weights[name].shape
    size = whole[0] // (1 if number is None else 3)
    rows = slice((number or 0) * size, ((number or 0) + 1) * size)

    def back(gradient):
        found = np.zeros(whole, "float32")
        found[rows] = gradient.reshape(-1, size).T.reshape(size, *whole[1:])
        return found

    recorded.put(
        variable,
        name,
        to=lambda w: w[rows].T.reshape(variable.shape),
        back=back,
    )


def attention(recorded, x, name, heads, epsilon):
    """A `VisionAttention` in a graph."""
    dim = x.shape[-1]
    normed = recorded.has(f"{name}.q_norm")
    centered = recorded.has(f"{name}.q_norm.bias")
    make = CenteredAttention if centered else VisionAttention
    layer = make(heads, dim // heads, qk_norm=normed, qk_norm_epsilon=epsilon)
    y = layer(x, x)
    fill_attention(recorded, layer, name)
    if normed:
        fill_norm(recorded, layer.query_norm, f"{name}.q_norm")
        fill_norm(recorded, layer.key_norm, f"{name}.k_norm")
    return y


def encoder_block(recorded, x, names, heads, epsilon, activation):
    """An `EncoderBlock` in a graph, with a dense feed-forward.

    Args:
        recorded, x: A `Recorded`, and tokens.
        names: dict of names of `norm1`, `attention`, `norm2`, `up`, `down`.
        heads, epsilon, activation: Of the block.

    Returns:
        `(tokens, what the feed-forward reads, what it gives)`.
    """
    width = recorded.weights[f"{names['up']}.weight"].shape[0]
    block = EncoderBlock(
        heads, VisionMLP(width, activation), layer_norm_epsilon=epsilon
    )
    y = block(x)
    fill_norm(recorded, block.attention_norm, names["norm1"])
    fill_attention(recorded, block.attention, names["attention"])
    fill_norm(recorded, block.feed_forward_norm, names["norm2"])
    fill_dense(recorded, block.feed_forward.dense_1, names["up"])
    fill_dense(recorded, block.feed_forward.dense_2, names["down"])
    return y, *FeedForwardOf(block)(x)
