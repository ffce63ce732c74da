import keras
import numpy as np
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.checks import is_int
from keras_moe.vision.layers.positions import check_sincos_dim
from keras_moe.vision.layers.positions import resized_grid
from keras_moe.vision.layers.positions import sincos_positions

POSITIONS = ("learned", "sincos", None)


@keras.saving.register_keras_serializable("keras_moe")
class PatchEmbedding(keras.layers.Layer):
    """Cuts images into patches, and makes a token of each.

    ```
    tokens[b, i] = patches[b, i] @ kernel + bias
    tokens       = layer_norm(tokens)               with `layer_norm_epsilon`
    tokens       = [class_token, tokens]            with a class token
    y            = tokens + positions
    ```

    Patches do not overlap; they stand in the order of rows, from the top left.

    Args:
        hidden_dim: int. Width of the tokens.
        patch_size: int, or two, of the height and the width of a patch.
        use_class_token: bool. Whether a learned token of the whole image
            stands before the patches. Defaults to `False`.
        positions: `"learned"` adds a vector to each token, `"sincos"` fixed
            sines and cosines of row and column to each patch, not to the class
            token; `None` adds nothing. Defaults to `"learned"`.
        use_bias: bool. Whether patches have a bias. Defaults to `True`.
        layer_norm_epsilon: float, or `None` for no layer norm of the patches.
            Defaults to `None`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `None`, that of the Keras configuration.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, height, width, channels)`, or with `"channels_first"`
        `(batch, channels, height, width)`. Height, width and channels are
        static.

    Output shape:
        `(batch, tokens, hidden_dim)`

    Weights:
        `projection/kernel` `(patch height * patch width * channels, D)`,
        `projection/bias` `(D,)`, `class_token` `(1, 1, D)`, `positions`
        `(1, tokens, D)`.

    Raises:
        ValueError: If an argument is out of range, or the patches do not divide
            the images.

    Example:

    >>> layer = keras_moe.layers.PatchEmbedding(8, 4, use_class_token=True)
    >>> tuple(layer(keras.ops.ones((2, 16, 16, 3))).shape)
    (2, 17, 8)

    Reference:

    - [Dosovitskiy et al., 2020](https://arxiv.org/abs/2010.11929), equation 1
    """

    def __init__(
        self,
        hidden_dim,
        patch_size,
        use_class_token=False,
        positions="learned",
        use_bias=True,
        data_format=None,
        layer_norm_epsilon=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("hidden_dim", hidden_dim, 1)
        self.hidden_dim = hidden_dim
        self.patch_size = as_patch_size(patch_size)
        check_bool("use_class_token", use_class_token)
        self.use_class_token = use_class_token
        check_one_of("positions", positions, POSITIONS)
        if positions == "sincos":
            check_sincos_dim(hidden_dim)
        self.position_kind = positions
        check_bool("use_bias", use_bias)
        self.data_format = as_data_format(data_format)
        self.projection = keras.layers.Dense(
            hidden_dim,
            use_bias=use_bias,
            kernel_initializer="lecun_normal",
            dtype=self.dtype_policy,
            name="projection",
        )
        self.layer_norm_epsilon = layer_norm_epsilon
        self.norm = None
        if layer_norm_epsilon is not None:
            check_positive("layer_norm_epsilon", layer_norm_epsilon)
            self.norm = keras.layers.LayerNormalization(
                epsilon=layer_norm_epsilon, dtype=self.dtype_policy, name="norm"
            )

    def build(self, input_shape):
        height, width, channels = self.image_size(input_shape)
        self.grid = grid_of((height, width), self.patch_size)
        patch = self.patch_size[0] * self.patch_size[1] * channels
        self.projection.build((*input_shape[:1], None, patch))
        if self.norm is not None:
            self.norm.build((None, None, self.hidden_dim))
        self.class_token = self.positions = None
        if self.use_class_token:
            self.class_token = self.add_weight(
                name="class_token",
                shape=(1, 1, self.hidden_dim),
                initializer="zeros",
            )
        if self.position_kind == "learned":
            self.positions = self.add_weight(
                name="positions",
                shape=(1, self.num_tokens, self.hidden_dim),
                initializer=keras.initializers.RandomNormal(stddev=0.02),
            )

    def image_size(self, input_shape):
        """Height, width and channels of images of a shape."""
        if len(input_shape) != 4 or None in input_shape[1:]:
            raise ValueError(
                "Images must be of a shape of rank 4 that is static but for "
                f"the batch. Received: shape={tuple(input_shape)}"
            )
        if self.data_format == "channels_first":
            return (*input_shape[2:], input_shape[1])
        return tuple(input_shape[1:])

    @property
    def num_tokens(self):
        return self.grid[0] * self.grid[1] + int(self.use_class_token)

    def call(self, images):
        if self.data_format == "channels_first":
            images = ops.transpose(images, (0, 2, 3, 1))
        (rows, columns), (height, width) = self.grid, self.patch_size
        channels = images.shape[-1]
        x = ops.reshape(images, (-1, rows, height, columns, width, channels))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        size = height * width * channels
        x = self.projection(ops.reshape(x, (-1, rows * columns, size)))
        if self.norm is not None:
            x = self.norm(x)
        if self.position_kind == "sincos":
            # Constants stay in NumPy: TensorFlow's tensors would become inputs
            # of an ONNX file.
            waves = sincos_positions(rows, columns, self.hidden_dim)
            x = x + ops.cast(waves, x.dtype)
        if self.class_token is not None:
            token = ops.cast(self.class_token, x.dtype)
            token = ops.broadcast_to(
                token, (ops.shape(x)[0], 1, self.hidden_dim)
            )
            x = ops.concatenate([token, x], axis=1)
        if self.positions is not None:
            x = x + ops.cast(self.positions, x.dtype)
        return x

    def assign_positions_of(self, other):
        """Takes the learned positions of another layer, resized.

        Patches are resized linearly, with the corners where they are. The
        vector of the class token is taken as it is, or stays if the other layer
        has no class token.

        Args:
            other: A built `PatchEmbedding` of the same `hidden_dim`.

        Raises:
            ValueError: If a layer has no learned positions, or the widths
                differ.
        """
        for layer in (self, other):
            if layer.position_kind != "learned" or not layer.built:
                raise ValueError(
                    "Only layers that are built and have "
                    "`positions='learned'` have positions to resize. "
                    f"Received: positions={layer.position_kind!r}, "
                    f"built={layer.built}"
                )
        if self.hidden_dim != other.hidden_dim:
            raise ValueError(
                "`hidden_dim` of both layers must be the same. Received: "
                f"{self.hidden_dim} and {other.hidden_dim}"
            )
        found = ops.convert_to_numpy(other.positions)[0]
        token, patches = np.split(found, [int(other.use_class_token)])
        grid = patches.reshape((*other.grid, self.hidden_dim))
        parts = [resized_grid(grid, *self.grid).reshape(-1, self.hidden_dim)]
        if self.use_class_token:
            own = ops.convert_to_numpy(self.positions)[0, :1]
            parts.insert(0, token if len(token) else own)
        self.positions.assign(np.concatenate(parts)[None])

    def compute_output_shape(self, input_shape):
        height, width, _ = self.image_size(input_shape)
        rows, columns = grid_of((height, width), self.patch_size)
        tokens = rows * columns + int(self.use_class_token)
        return (input_shape[0], tokens, self.hidden_dim)

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "patch_size": self.patch_size,
            "use_class_token": self.use_class_token,
            "positions": self.position_kind,
            "use_bias": self.projection.use_bias,
            "data_format": self.data_format,
            "layer_norm_epsilon": self.layer_norm_epsilon,
        }


def as_patch_size(patch_size):
    """`(height, width)`, from one int or two."""
    sizes = (patch_size,) * 2 if is_int(patch_size) else patch_size
    if (
        not isinstance(sizes, (list, tuple))
        or len(sizes) != 2
        or not all(is_int(size) and size > 0 for size in sizes)
    ):
        raise ValueError(
            "`patch_size` must be a positive int or two. "
            f"Received: patch_size={patch_size!r}"
        )
    return tuple(sizes)


def as_data_format(data_format):
    if data_format is None:
        data_format = keras.config.image_data_format()
    check_one_of(
        "data_format", data_format, ("channels_last", "channels_first")
    )
    return data_format


def grid_of(image_size, patch_size):
    """Rows and columns of patches."""
    if any(i % p for i, p in zip(image_size, patch_size, strict=True)):
        raise ValueError(
            "`patch_size` must divide the height and the width of the images. "
            f"Received: patch_size={tuple(patch_size)}, images of "
            f"{tuple(image_size)}"
        )
    return tuple(i // p for i, p in zip(image_size, patch_size, strict=True))
