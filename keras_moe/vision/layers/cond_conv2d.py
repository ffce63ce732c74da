import keras
from keras import ops

from keras_moe.checks import as_ints
from keras_moe.checks import as_keras_object
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.experts.experts import as_part_of_bank
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.ops import activations
from keras_moe.stacked.per_expert import PerExpertConstraint
from keras_moe.stacked.per_expert import PerExpertInitializer
from keras_moe.stacked.per_expert import PerExpertRegularizer
from keras_moe.vision.layers.image_router import as_image_router
from keras_moe.vision.layers.image_router import check_weights_shape
from keras_moe.vision.layers.image_router import image_weights
from keras_moe.vision.layers.per_example_conv import as_padding
from keras_moe.vision.layers.per_example_conv import output_sizes
from keras_moe.vision.layers.per_example_conv import pad_images
from keras_moe.vision.layers.per_example_conv import per_example_conv

DATA_FORMATS = ("channels_last", "channels_first")


@keras.saving.register_keras_serializable("keras_moe")
class CondConv2D(keras.layers.Layer):
    """Convolves each image with its own mixture of kernels (CondConv).

    ```
    weights = sigmoid(mean of x over height and width @ kernel_r + bias_r)
    kernel  = sum over e of weights[e] * kernels[e]
    bias    = sum over e of weights[e] * biases[e]
    y       = activation(conv(x, kernel) + bias)
    ```

    The kernels are mixed before the convolution, so it costs about as much as
    one convolution for any number of experts. The memory for the mixed kernels
    grows with the batch. What comes out for an image does not depend on the
    other images.

    Args:
        filters: int. Number of output channels.
        kernel_size: int, or a pair of ints. Height and width of the kernels.
        num_experts: int. Number of kernels to mix. `None` is the number of the
            router, or 4 without one. Defaults to `None`.
        strides: int, or a pair of ints. Defaults to `1`.
        padding: `"valid"`, `"same"`, or how many rows and columns of zeros
            stand on each side, as an int or a pair of ints. `"same"` puts the
            odd row below, as everywhere in Keras; models of PyTorch with
            strides of 2 have an int, `kernel_size // 2`. Defaults to `"valid"`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `keras.config.image_data_format()`.
        dilation_rate: int, or a pair of ints. Defaults to `1`.
        groups: int. Number of groups of channels that are convolved separately.
            As many as input channels make it depthwise. Defaults to `1`.
        activation: Any Keras activation. Defaults to `None`.
        use_bias: bool. Whether each expert has a bias. Defaults to `True`.
        router: What weighs the experts, from the means of the channels of each
            image: a router of `keras_moe.routers` that decides for each image
            by itself, or its name. For example
            `DenseRouter(4, temperature=30.0)`, a softmax, makes it a dynamic
            convolution. `None` is `DenseRouter` with a sigmoid and a bias.
            Defaults to `None`.
        kernel_initializer: Initializer of each kernel. A seeded one draws
            differently for each expert. Defaults to `"glorot_uniform"`.
        bias_initializer: Initializer of the biases. Defaults to `"zeros"`.
        kernel_regularizer: Regularizer of each kernel; the values are summed.
            Defaults to `None`.
        bias_regularizer: The same for the biases. Defaults to `None`.
        kernel_constraint: Constraint of each kernel. Defaults to `None`.
        bias_constraint: Constraint of each bias. Defaults to `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of images.
        routing_weights: Tensor of shape `(batch, num_experts)`: the weights of
            the experts, from a router outside that several convolutions share.
            A layer whose first call has them makes no router, and needs them in
            every call. Defaults to `None`.
        training: bool. Whether a router that draws noise does so.

    Input shape:
        `(batch, height, width, channels)`, or with `"channels_first"`
        `(batch, channels, height, width)`. Only `channels` must be known.

    Output shape:
        The same with `filters` channels, and the height and width that
        `keras.layers.Conv2D` has.

    Weights:
        `kernel` `(num_experts, *kernel_size, channels / groups, filters)` and
        `bias` `(num_experts, filters)`; those of the router.

    Raises:
        ValueError: If an argument is out of range, or does not fit the inputs;
            if `routing_weights` are missing.

    Example:

    >>> layer = keras_moe.layers.CondConv2D(16, 3, padding="same")
    >>> tuple(layer(keras.ops.ones((2, 8, 8, 3))).shape)
    (2, 8, 8, 16)

    Two convolutions with one router:

    ```python
    pooled = keras.layers.GlobalAveragePooling2D()(x)
    weights = keras.layers.Dense(4, activation="sigmoid")(pooled)
    x = keras_moe.layers.CondConv2D(64, 1)(x, routing_weights=weights)
    x = keras_moe.layers.CondConv2D(64, 3, groups=64)(
        x, routing_weights=weights
    )
    ```

    Reference:

    - [Yang et al., 2019](https://arxiv.org/abs/1904.04971), section 3
    - [Chen et al., 2019](https://arxiv.org/abs/1912.03458), section 3 (dynamic
      convolution)
    """

    def __init__(
        self,
        filters,
        kernel_size,
        num_experts=None,
        strides=1,
        padding="valid",
        data_format=None,
        dilation_rate=1,
        groups=1,
        activation=None,
        use_bias=True,
        router=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("filters", filters, 1)
        check_int("groups", groups, 1)
        if filters % groups:
            raise ValueError(
                "`groups` must divide `filters`. "
                f"Received: groups={groups}, filters={filters}"
            )
        check_bool("use_bias", use_bias)
        self.filters = filters
        self.kernel_size = tuple(as_ints("kernel_size", kernel_size, 2, 1))
        self.strides = tuple(as_ints("strides", strides, 2, 1))
        self.dilation_rate = tuple(
            as_ints("dilation_rate", dilation_rate, 2, 1)
        )
        self.padding = as_padding(padding)
        if data_format is None:
            data_format = keras.config.image_data_format()
        check_one_of("data_format", data_format, DATA_FORMATS)
        self.data_format = data_format
        self.groups = groups
        self.activation = as_keras_object(
            "activation", activations.get, activation
        )
        self.use_bias = use_bias
        self.router = as_image_router(router, num_experts, self.dtype_policy)
        self.num_experts = self.router.num_experts
        self.kernel_initializer = as_part_of_bank(
            "kernel_initializer", kernel_initializer
        )
        self.bias_initializer = as_part_of_bank(
            "bias_initializer", bias_initializer
        )
        self.kernel_regularizer = as_part_of_bank(
            "kernel_regularizer", kernel_regularizer
        )
        self.bias_regularizer = as_part_of_bank(
            "bias_regularizer", bias_regularizer
        )
        self.kernel_constraint = as_part_of_bank(
            "kernel_constraint", kernel_constraint
        )
        self.bias_constraint = as_part_of_bank(
            "bias_constraint", bias_constraint
        )

    def build(self, inputs_shape, routing_weights_shape=None):
        channels = self._check_images(inputs_shape)
        self.compute_output_shape(inputs_shape)  # raises for small images
        axis = -1 if self.data_format == "channels_last" else 1
        self.input_spec = keras.layers.InputSpec(ndim=4, axes={axis: channels})
        if routing_weights_shape is None:
            if not self.router.built:  # it may be that of another layer
                self.router.build((None, channels))
        else:
            check_weights_shape(routing_weights_shape, self.num_experts)
        size = (*self.kernel_size, channels // self.groups, self.filters)
        self.kernel = self._add_bank("kernel", size)
        self.bias = None
        if self.use_bias:
            self.bias = self._add_bank("bias", (self.filters,))

    def _add_bank(self, name, shape):
        regularizer = getattr(self, f"{name}_regularizer")
        constraint = getattr(self, f"{name}_constraint")
        return self.add_weight(
            name=name,
            shape=(self.num_experts, *shape),
            initializer=PerExpertInitializer(
                getattr(self, f"{name}_initializer"), int(name == "bias")
            ),
            regularizer=regularizer and PerExpertRegularizer(regularizer),
            constraint=constraint and PerExpertConstraint(constraint),
        )

    def call(self, inputs, routing_weights=None, training=None):
        images = ops.cast(inputs, self.compute_dtype)
        if self.data_format == "channels_first":
            images = ops.transpose(images, (0, 2, 3, 1))
        if routing_weights is None:
            if not self.router.built:
                raise ValueError(
                    "`routing_weights` must be given, as they were when the "
                    "layer was built. Received: routing_weights=None"
                )
            routing_weights = image_weights(self.router, images, training)
        check_weights_shape(routing_weights.shape, self.num_experts)
        weights = ops.cast(routing_weights, self.compute_dtype)  # (B, E)
        kernels = self._mix(weights, self.kernel)
        images = pad_images(
            images,
            self.kernel_size,
            self.strides,
            self.padding,
            self.dilation_rate,
        )
        y = per_example_conv(images, kernels, self.strides, self.dilation_rate)
        if self.bias is not None:
            y = y + self._mix(weights, self.bias)[:, None, None]
        if self.data_format == "channels_first":
            y = ops.transpose(y, (0, 3, 1, 2))
        return self.activation(y)

    def _mix(self, weights, bank):  # (B, ...)
        flat = ops.reshape(bank, (self.num_experts, -1))
        mixed = ops.einsum("be,en->bn", weights, flat)
        return ops.reshape(mixed, (-1, *bank.shape[1:]))

    def _check_images(self, shape):
        if len(shape) != 4:
            raise ValueError(
                "The input of CondConv2D must be of rank 4. "
                f"Received: inputs_shape={tuple(shape)}"
            )
        channels = shape[-1 if self.data_format == "channels_last" else 1]
        if channels is None or channels % self.groups:
            raise ValueError(
                "The input of CondConv2D must have a static number of channels "
                "that `groups` divides. "
                f"Received: inputs_shape={tuple(shape)}, groups={self.groups}, "
                f"data_format={self.data_format!r}"
            )
        return channels

    def compute_output_shape(self, inputs_shape, routing_weights_shape=None):
        first = self.data_format == "channels_first"
        sizes = output_sizes(
            inputs_shape[2:] if first else inputs_shape[1:3],
            self.kernel_size,
            self.strides,
            self.padding,
            self.dilation_rate,
        )
        if first:
            return (inputs_shape[0], self.filters, *sizes)
        return (inputs_shape[0], *sizes, self.filters)

    def get_config(self):
        config = {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "num_experts": self.num_experts,
            "strides": self.strides,
            "padding": self.padding,
            "data_format": self.data_format,
            "dilation_rate": self.dilation_rate,
            "groups": self.groups,
            "activation": activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "router": serialize_part(self.router),
        }
        for kind in ("initializer", "regularizer", "constraint"):
            serialize = getattr(keras, f"{kind}s").serialize
            for name in (f"kernel_{kind}", f"bias_{kind}"):
                config[name] = serialize(getattr(self, name))
        return config
