"""The graph of a `SASRecMoE`."""

import keras
import numpy as np
from keras import ops

from keras_moe.moe.moe import MoE

# The logit of padding, which is never recommended.
NEVER = -1e9


def sasrec_graph(
    num_items, length, embedding_dim, num_blocks, num_heads, dropout, moe
):
    """Builds the functional graph.

    Returns:
        `(ids, logits (B, L, items), logits at the last item (B, items))`.
    """
    ids = keras.Input((length,), dtype="int32", name="ids")
    items = keras.layers.ReversibleEmbedding(
        num_items + 1,
        embedding_dim,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
        reverse_dtype="float32",
        name="items",
    )
    # Constants stay in NumPy: TensorFlow's tensors would become inputs of an
    # ONNX file.
    places = ops.zeros_like(ids) + np.arange(length, dtype="int32")
    positions = keras.layers.Embedding(length, embedding_dim, name="positions")
    x = items(ids) * embedding_dim**0.5 + positions(places)
    x = keras.layers.Dropout(dropout, name="dropout")(x)
    is_item = ids > 0
    may_look = attention_mask(is_item, length)
    for i in range(num_blocks):
        h = keras.layers.LayerNormalization(name=f"attention_norm_{i}")(x)
        h = keras.layers.MultiHeadAttention(
            num_heads,
            embedding_dim // num_heads,
            dropout=dropout,
            name=f"attention_{i}",
        )(h, h, attention_mask=may_look)
        x = x + keras.layers.Dropout(dropout, name=f"attention_drop_{i}")(h)
        h = keras.layers.LayerNormalization(name=f"moe_norm_{i}")(x)
        h = MoE(**moe, name=f"moe_{i}")(h, mask=is_item)
        x = x + keras.layers.Dropout(dropout, name=f"moe_drop_{i}")(h)
    x = keras.layers.LayerNormalization(name="norm")(x)
    never = np.zeros(num_items + 1, "float32")
    never[0] = NEVER
    # The last position that holds an item.
    number = ops.cumsum(ops.cast(is_item, "int32"), axis=1)
    is_last = ops.logical_and(is_item, ops.equal(number, number[:, -1:]))
    last = ops.sum(x * ops.cast(is_last, x.dtype)[:, :, None], axis=1)
    return (
        ids,
        items(x, reverse=True) + never,
        items(last, reverse=True) + never,
    )


def attention_mask(is_item, length):
    """Which positions each position may attend to, `(B, L, L)`.

    Each attends to itself and to earlier items. Padding attends to itself too:
    a softmax over nothing is NaN, which would spread to other positions.
    """
    not_later = np.tri(length, dtype="bool")
    itself = np.eye(length, dtype="bool")
    seen = ops.logical_or(is_item[:, None, :], itself)
    return ops.logical_and(seen, not_later)
