import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.ops import activations
from keras_moe.vision.layers.cond_conv2d import CondConv2D
from keras_moe.vision.layers.image_router import as_image_router
from keras_moe.vision.layers.image_router import image_weights
from keras_moe.vision.layers.per_example_conv import output_sizes
from keras_moe.vision.layers.per_example_conv import pad_images

PADDINGS = ("same", "symmetric")


@keras.saving.register_keras_serializable("keras_moe")
class InvertedResidualBlock(keras.layers.Layer):
    """A block of a MobileNet or EfficientNet, perhaps of mixed kernels.

    ```
    y = activation(norm(pointwise conv(x)))          with an `expansion`
    y = activation(norm(depthwise conv(y)))
    y = y * sigmoid(dense_2(activation(dense_1(mean of y over the image))))
    y = norm(pointwise conv(y))
    y = x + y                                        if of the same shape
    ```

    With `num_experts`, the kernels of all convolutions are mixed for each
    image, with the weights that one router gives to the mean of `x`
    (`keras_moe.layers.CondConv2D`).

    Args:
        filters: int. Channels that come out.
        kernel_size: int. Of the depthwise convolution. Defaults to `3`.
        strides: int. Of the depthwise convolution. Defaults to `1`.
        expansion: float, or `None` for no first convolution. Its channels by
            those of the input, in the nearest multiple of 8. Defaults to `6.0`.
        squeeze_ratio: float, 0 for no squeeze and excitation. The width of its
            hidden layer, by the channels before the expansion. Defaults to
            `0.25`.
        num_experts: int, or `None` for plain convolutions. Defaults to `None`.
        router: As for `keras_moe.layers.CondConv2D`; only with `num_experts`.
            Defaults to `None`.
        activation: Activation within the block. Defaults to `"silu"`.
        padding: `"same"` as in Keras, where the odd row stands below, or
            `"symmetric"` as in models of PyTorch; they differ with strides.
            Defaults to `"same"`.
        batch_norm_epsilon: float. Defaults to `1e-3`.
        batch_norm_momentum: float. Defaults to `0.99`.
        drop_path: float. Share of the images that skip the block, in training.
            Defaults to `0.0`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, height, width, channels)`.
        training: bool. Whether to normalize by the batch, drop paths, and what
            the router makes of it.

    Input shape:
        `(batch, height, width, channels)`

    Output shape:
        The same with `filters` channels, height and width divided by `strides`.

    Raises:
        ValueError: If an argument is out of range, or does not fit the inputs.

    Example:

    >>> block = keras_moe.layers.InvertedResidualBlock(16, num_experts=4)
    >>> tuple(block(keras.ops.ones((2, 8, 8, 12))).shape)
    (2, 8, 8, 16)

    Reference:

    - [Sandler et al., 2018](https://arxiv.org/abs/1801.04381), section 3
    - [Yang et al., 2019](https://arxiv.org/abs/1904.04971), section 3
    """

    def __init__(
        self,
        filters,
        kernel_size=3,
        strides=1,
        expansion=6.0,
        squeeze_ratio=0.25,
        num_experts=None,
        router=None,
        activation="silu",
        padding="same",
        batch_norm_epsilon=1e-3,
        batch_norm_momentum=0.99,
        drop_path=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for name in ("filters", "kernel_size", "strides"):
            check_int(name, locals()[name], 1)
        if expansion is not None:
            check_positive("expansion", expansion)
        check_at_least("squeeze_ratio", squeeze_ratio, 0)
        check_one_of("padding", padding, PADDINGS)
        check_positive("batch_norm_epsilon", batch_norm_epsilon)
        check_rate("batch_norm_momentum", batch_norm_momentum)
        check_rate("drop_path", drop_path)
        self.filters = filters
        self.kernel_size = kernel_size
        self.strides = strides
        self.expansion = expansion
        self.squeeze_ratio = squeeze_ratio
        self.num_experts = num_experts
        self.activation = as_keras_object(
            "activation", activations.get, activation
        )
        self.padding = padding
        self.batch_norm_epsilon = batch_norm_epsilon
        self.batch_norm_momentum = batch_norm_momentum
        self.drop_path = drop_path
        self.router = None
        if num_experts is not None:
            self.router = as_image_router(
                router, num_experts, self.dtype_policy
            )
        elif router is not None:
            raise ValueError(
                "`router` needs `num_experts`. "
                f"Received: router={router!r}, num_experts=None"
            )
        self._drop_path = None
        if drop_path:
            self._drop_path = keras.layers.Dropout(
                drop_path, noise_shape=(None, 1, 1, 1), dtype=self.dtype_policy
            )

    def build(self, inputs_shape):
        if len(inputs_shape) != 4 or inputs_shape[-1] is None:
            raise ValueError(
                "The input of InvertedResidualBlock must be of shape (batch, "
                "height, width, channels) with static channels. "
                f"Received: inputs_shape={tuple(inputs_shape)}"
            )
        channels = width = inputs_shape[-1]
        if self.router is not None:
            self.router.build((None, channels))
        self.expand = self.expand_norm = None
        if self.expansion is not None:
            width = divisible(channels * self.expansion)
            self.expand = self._conv("expand", channels, width)
            self.expand_norm = self._norm("expand_norm", width)
        self.depthwise = self._conv("depthwise", width, width, True)
        self.depthwise_norm = self._norm("depthwise_norm", width)
        self.squeeze = self.excite = None
        if self.squeeze_ratio:
            hidden = width * self.squeeze_ratio / (self.expansion or 1)
            hidden = max(round(hidden), 1)
            self.squeeze = self._dense("squeeze", width, hidden)
            self.excite = self._dense("excite", hidden, width)
        self.project = self._conv("project", width, self.filters)
        self.project_norm = self._norm("project_norm", self.filters)

    def _conv(self, name, channels, filters, depthwise=False):
        options = {
            "use_bias": False,
            "data_format": "channels_last",
            "dtype": self.dtype_policy,
            "name": name,
        }
        size = self.kernel_size if depthwise else 1
        if depthwise:
            options["strides"] = self.strides
        shapes = [(None, None, None, channels)]
        if self.num_experts is not None:
            groups = channels if depthwise else 1
            layer = CondConv2D(
                filters, size, self.num_experts, groups=groups, **options
            )
            shapes.append((None, self.num_experts))
        elif depthwise:
            layer = keras.layers.DepthwiseConv2D(size, **options)
        else:
            layer = keras.layers.Conv2D(filters, size, **options)
        layer.build(*shapes)
        return layer

    def _norm(self, name, channels):
        layer = keras.layers.BatchNormalization(
            epsilon=self.batch_norm_epsilon,
            momentum=self.batch_norm_momentum,
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, None, channels))
        return layer

    def _dense(self, name, dim, units):
        layer = keras.layers.Dense(units, dtype=self.dtype_policy, name=name)
        layer.build((None, dim))
        return layer

    def call(self, inputs, training=None):
        kwargs = {}
        if self.router is not None:
            kwargs["routing_weights"] = self.routing_weights(inputs, training)
        x = inputs
        if self.expand is not None:
            x = self.expand_norm(self.expand(x, **kwargs), training=training)
            x = self.activation(x)
        x = padded(x, self.kernel_size, self.strides, self.padding)
        x = self.depthwise(x, **kwargs)
        x = self.activation(self.depthwise_norm(x, training=training))
        if self.squeeze is not None:
            mean = ops.mean(x, axis=(1, 2))
            gate = self.excite(self.activation(self.squeeze(mean)))
            x = x * ops.sigmoid(gate)[:, None, None]
        x = self.project_norm(self.project(x, **kwargs), training=training)
        if self.strides > 1 or inputs.shape[-1] != self.filters:
            return x
        if self._drop_path is not None:
            x = self._drop_path(x, training=training)
        return inputs + x

    def routing_weights(self, inputs, training=None):
        """The weight of every expert for each image, `(batch, num_experts)`."""
        return image_weights(self.router, inputs, training)

    def compute_output_shape(self, inputs_shape):
        sizes = output_sizes(
            inputs_shape[1:3],
            (self.kernel_size,) * 2,
            (self.strides,) * 2,
            padding_of(self.kernel_size, self.strides, self.padding),
            (1, 1),
        )
        return (inputs_shape[0], *sizes, self.filters)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "expansion": self.expansion,
            "squeeze_ratio": self.squeeze_ratio,
            "num_experts": self.num_experts,
            "router": serialize_part(self.router),
            "activation": activations.serialize(self.activation),
            "padding": self.padding,
            "batch_norm_epsilon": self.batch_norm_epsilon,
            "batch_norm_momentum": self.batch_norm_momentum,
            "drop_path": self.drop_path,
        }


def divisible(channels, divisor=8):
    """The nearest multiple of a divisor that is not below 90 %."""
    nearest = max(int(channels + divisor / 2) // divisor, 1) * divisor
    return nearest if nearest >= 0.9 * channels else nearest + divisor


def padding_of(kernel_size, strides, padding):
    """`"same"`, or the rows and columns of zeros on each side."""
    if padding == "same":
        return "same"
    return ((strides - 1 + kernel_size - 1) // 2,) * 2


def padded(images, kernel_size, strides, padding):
    """Images for a convolution that pads nothing itself."""
    return pad_images(
        images,
        (kernel_size,) * 2,
        (strides,) * 2,
        padding_of(kernel_size, strides, padding),
        (1, 1),
    )
