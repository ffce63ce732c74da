import keras
from keras import ops

from keras_moe.moe.part_arguments import serialize_part
from keras_moe.stacked import layer_copies
from keras_moe.vision.layers.feed_forward import as_feed_forward
from keras_moe.vision.layers.feed_forward import call_feed_forward


@keras.saving.register_keras_serializable("keras_moe")
class TokenMixing(keras.layers.Layer):
    """Mixes the tokens of an image by a feed-forward layer (MLP-Mixer).

    ```
    y[b, :, d] = feed_forward(x[b, :, d])
    ```

    The layer sees each channel as a row of all tokens. With
    `keras_moe.layers.MoE`, each channel of each image goes to its own experts.

    Args:
        feed_forward: A layer from `(batch, D, tokens)` to the same shape.
        route_per: `"token"`, or `"image"`: the router of a `MoE` sees the mean
            over the channels, so that they all go to the same experts. Defaults
            to `"token"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, tokens, D)`.
        training: bool. What the layer makes of it.

    Input shape:
        `(batch, tokens, D)`, with static `tokens`.

    Output shape:
        Same as the input.

    Raises:
        ValueError: If `feed_forward` is no layer, or cannot take what the
            arguments ask for.

    Example:

    >>> layer = keras_moe.layers.TokenMixing(
    ...     keras_moe.layers.MoE(4, intermediate_dim=8)
    ... )
    >>> tuple(layer(keras.ops.ones((3, 5, 8))).shape)
    (3, 5, 8)

    Reference:

    - [Tolstikhin et al., 2021](https://arxiv.org/abs/2105.01601), equation 1
    - [Lou et al., 2021](https://arxiv.org/abs/2109.02008) (experts)
    """

    def __init__(self, feed_forward, route_per="token", **kwargs):
        super().__init__(**kwargs)
        self.feed_forward = as_feed_forward(feed_forward, None, route_per)
        self.route_per = route_per

    def build(self, inputs_shape):
        batch, tokens, dim = inputs_shape
        layer_copies.build(
            self.feed_forward, (batch, dim, tokens), self.compute_dtype
        )

    def call(self, inputs, training=None):
        x = ops.transpose(inputs, (0, 2, 1))
        x = call_feed_forward(
            self.feed_forward, x, None, self.route_per, training=training
        )
        return ops.transpose(x, (0, 2, 1))

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "feed_forward": serialize_part(self.feed_forward),
            "route_per": self.route_per,
        }
