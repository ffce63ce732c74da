import keras
from keras import ops

from keras_moe.checks import check_int


@keras.saving.register_keras_serializable("keras_moe")
class TextEmbedding(keras.layers.Layer):
    """Makes a token of each id of a text, with its place.

    ```
    y[b, i] = embeddings[ids[b, i]] + positions[i]
    ```

    Args:
        vocabulary_size: int. Ids run from 0 to `vocabulary_size - 1`.
        hidden_dim: int. Width of the tokens.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, length)`, of whole numbers. `length` is static.

    Output shape:
        `(batch, length, hidden_dim)`

    Weights:
        `embeddings` `(vocabulary_size, D)`, `positions` `(1, length, D)`.

    Raises:
        ValueError: If an argument is out of range, or `length` is not static.

    Example:

    >>> layer = keras_moe.layers.TextEmbedding(30, hidden_dim=8)
    >>> tuple(layer(keras.ops.ones((2, 5), "int32")).shape)
    (2, 5, 8)

    Reference:

    - [Vaswani et al., 2017](https://arxiv.org/abs/1706.03762), sections 3.4
      and 3.5
    """

    def __init__(self, vocabulary_size, hidden_dim, **kwargs):
        super().__init__(**kwargs)
        check_int("vocabulary_size", vocabulary_size, 1)
        check_int("hidden_dim", hidden_dim, 1)
        self.vocabulary_size = vocabulary_size
        self.hidden_dim = hidden_dim

    def build(self, input_shape):
        if len(input_shape) != 2 or input_shape[1] is None:
            raise ValueError(
                "The ids of texts must be of shape (batch, length) with a "
                f"static length. Received: shape={tuple(input_shape)}"
            )
        self.length = input_shape[1]
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.vocabulary_size, self.hidden_dim),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
        )
        self.positions = self.add_weight(
            name="positions",
            shape=(1, self.length, self.hidden_dim),
            initializer=keras.initializers.RandomNormal(stddev=0.02),
        )

    def call(self, ids):
        if ids.shape[1] != self.length:
            raise ValueError(
                "Texts must be of the length that the layer was built with. "
                f"Received: length {ids.shape[1]}, built with {self.length}"
            )
        x = ops.take(self.embeddings, ops.cast(ids, "int32"), axis=0)
        x = x + self.positions
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.hidden_dim)

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "hidden_dim": self.hidden_dim,
        }
