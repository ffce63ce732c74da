import keras
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.stacked import layer_copies
from keras_moe.vision.layers.feed_forward import as_feed_forward
from keras_moe.vision.layers.feed_forward import call_feed_forward


@keras.saving.register_keras_serializable("keras_moe")
class ConvNeXtBlock(keras.layers.Layer):
    """A block of a ConvNeXt around any feed-forward layer.

    ```
    y = x + scale * feed_forward(layer_norm(depthwise_conv(x)))
    ```

    Each position of the feature map is a token of the feed-forward layer.

    Args:
        feed_forward: A layer from `(batch, tokens, C)` to the same shape, such
            as `keras_moe.layers.MoE`.
        kernel_size: int. Rows and columns of the convolution, which fills the
            map up with zeros. Defaults to `7`.
        layer_scale: float, or `None` for no scale. What the learned scale of
            each channel starts with. Defaults to `1e-6`.
        layer_norm_epsilon: float. Defaults to `1e-6`.
        drop_path: float. Share of the images that skip the block, in training.
            Defaults to `0.0`.
        group_size, route_per: As for `keras_moe.layers.EncoderBlock`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, height, width, C)`.
        training: bool. Whether to drop paths, and what the layer makes of it.

    Input shape:
        `(batch, height, width, C)`

    Output shape:
        Same as the input.

    Raises:
        ValueError: If an argument is out of range, or `feed_forward` cannot
            take what the arguments ask for.

    Example:

    >>> block = keras_moe.layers.ConvNeXtBlock(
    ...     keras_moe.layers.MoE(4, intermediate_dim=8)
    ... )
    >>> tuple(block(keras.ops.ones((2, 6, 5, 8))).shape)
    (2, 6, 5, 8)

    Reference:

    - [Liu et al., 2022](https://arxiv.org/abs/2201.03545), section 2.6
    """

    def __init__(
        self,
        feed_forward,
        kernel_size=7,
        layer_scale=1e-6,
        layer_norm_epsilon=1e-6,
        drop_path=0.0,
        group_size=None,
        route_per="token",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("kernel_size", kernel_size, 1)
        if layer_scale is not None:
            check_positive("layer_scale", layer_scale)
        check_positive("layer_norm_epsilon", layer_norm_epsilon)
        check_rate("drop_path", drop_path)
        self.feed_forward = as_feed_forward(feed_forward, group_size, route_per)
        self.kernel_size = kernel_size
        self.layer_scale = layer_scale
        self.layer_norm_epsilon = layer_norm_epsilon
        self.drop_path = drop_path
        self.group_size = group_size
        self.route_per = route_per
        self.depthwise = keras.layers.DepthwiseConv2D(
            kernel_size,
            padding="same",
            data_format="channels_last",
            dtype=self.dtype_policy,
            name="depthwise",
        )
        self.norm = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=self.dtype_policy, name="norm"
        )
        self._drop_path = None
        if drop_path:
            self._drop_path = keras.layers.Dropout(
                drop_path, noise_shape=(None, 1, 1, 1), dtype=self.dtype_policy
            )

    def build(self, inputs_shape):
        if len(inputs_shape) != 4 or inputs_shape[-1] is None:
            raise ValueError(
                "The input of ConvNeXtBlock must be of shape (batch, height, "
                "width, channels) with static channels. "
                f"Received: inputs_shape={tuple(inputs_shape)}"
            )
        _, height, width, channels = inputs_shape
        self.depthwise.build(inputs_shape)
        self.norm.build(inputs_shape)
        tokens = None if None in (height, width) else height * width
        layer_copies.build(
            self.feed_forward,
            (None, self.group_size or tokens, channels),
            self.compute_dtype,
        )
        self.scale = None
        if self.layer_scale is not None:
            self.scale = self.add_weight(
                name="scale",
                shape=(channels,),
                initializer=keras.initializers.Constant(self.layer_scale),
            )

    def call(self, inputs, training=None):
        batch, height, width, channels = ops.shape(inputs)
        x = self.norm(self.depthwise(inputs))
        x = call_feed_forward(
            self.feed_forward,
            ops.reshape(x, (batch, height * width, channels)),
            self.group_size,
            self.route_per,
            training=training,
        )
        x = ops.reshape(x, (batch, height, width, channels))
        # A part may have a dtype of its own, by a DTypePolicyMap.
        x = ops.cast(x, inputs.dtype)
        if self.scale is not None:
            x = x * ops.cast(self.scale, x.dtype)
        if self._drop_path is not None:
            x = self._drop_path(x, training=training)
        return inputs + x

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "feed_forward": serialize_part(self.feed_forward),
            "kernel_size": self.kernel_size,
            "layer_scale": self.layer_scale,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "drop_path": self.drop_path,
            "group_size": self.group_size,
            "route_per": self.route_per,
        }
