"""What comes before and after the blocks of a diffusion transformer."""

import keras
import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.checks import check_int
from keras_moe.checks import check_rate
from keras_moe.checks import check_seed
from keras_moe.vision.layers.dit_block import modulation
from keras_moe.vision.layers.dit_block import modulation_parts
from keras_moe.vision.layers.dit_block import plain_norm

FREQUENCIES = 128
MAX_PERIOD = 10000.0


@keras.saving.register_keras_serializable("keras_moe")
class DiffusionEmbedding(keras.layers.Layer):
    """A vector of the time step and the class of each image.

    ```
    waves = [cos(t * f), sin(t * f)]    f[i] = 10000 ** (-i / 128), i < 128
    y     = dense_2(silu(dense_1(waves))) + embeddings[label]
    ```

    In training a label is replaced by `num_classes`, which stands for no class,
    with probability `label_dropout` (Ho and Salimans, 2022, algorithm 1).

    Args:
        hidden_dim: int. Width of the vector.
        num_classes: int.
        label_dropout: float. Defaults to `0.1`.
        seed: int, or `None`. Seed of the dropout.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self, hidden_dim, num_classes, label_dropout=0.1, seed=None, **kwargs
    ):
        # No autocast: it would round time steps to half precision.
        super().__init__(autocast=False, **kwargs)
        check_int("num_classes", num_classes, 1)
        check_rate("label_dropout", label_dropout)
        check_seed("seed", seed)
        self.hidden_dim = hidden_dim
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.seed = seed
        # Only if used: a seed generator is state of the layer.
        if label_dropout:
            self.seed_generator = keras.random.SeedGenerator(seed)
        self.dense_1, self.dense_2 = (
            keras.layers.Dense(
                hidden_dim,
                activation=activation,
                kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
                dtype=self.dtype_policy,
                name=name,
            )
            for name, activation in (("dense_1", "silu"), ("dense_2", None))
        )
        self.embedding = keras.layers.Embedding(
            num_classes + 1,
            hidden_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),
            dtype=self.dtype_policy,
            name="embedding",
        )

    def build(self, timesteps_shape, labels_shape):
        self.dense_1.build((None, 2 * FREQUENCIES))
        self.dense_2.build((None, self.hidden_dim))
        self.embedding.build(labels_shape)

    def call(self, timesteps, labels, training=None):
        steps = np.arange(FREQUENCIES) / FREQUENCIES
        frequencies = (MAX_PERIOD**-steps).astype("float32")
        timesteps = ops.cast(timesteps, "float32")
        angles = ops.multiply(timesteps[:, None], frequencies)
        waves = ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=1)
        x = self.dense_2(self.dense_1(ops.cast(waves, self.compute_dtype)))
        return x + self.embedding(self._labels(labels, training))

    def _labels(self, labels, training):
        labels = ops.cast(labels, "int32")
        if not backend.is_symbolic(labels):
            values = ops.convert_to_numpy(labels)
            wrong = values[(values < 0) | (values > self.num_classes)]
            if wrong.size:
                raise ValueError(
                    "`labels` must be from 0 to `num_classes`, which stands "
                    f"for no class. Received: {wrong[0]}, "
                    f"num_classes={self.num_classes}"
                )
        # In compiled code the nearest one is taken, on every backend.
        labels = ops.clip(labels, 0, self.num_classes)
        if training and self.label_dropout:
            draws = keras.random.uniform(
                ops.shape(labels), seed=self.seed_generator
            )
            dropped = draws < self.label_dropout
            none = ops.full_like(labels, self.num_classes)
            labels = ops.where(dropped, none, labels)
        return labels

    def compute_output_shape(self, timesteps_shape, labels_shape):
        return (timesteps_shape[0], self.hidden_dim)

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "num_classes": self.num_classes,
            "label_dropout": self.label_dropout,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable("keras_moe")
class DiTHead(keras.layers.Layer):
    """Images from the tokens of a diffusion transformer.

    ```
    shift, scale = split(silu(condition) @ kernel + bias)
    patches      = dense(norm(x) * (1 + scale) + shift)
    ```

    All weights start with zeros.

    Args:
        grid: Two ints, rows and columns of patches.
        patch_size: Two ints, height and width of a patch.
        channels: int. Channels of the images.
        data_format: str. `"channels_last"` or `"channels_first"`.
        layer_norm_epsilon: float. Defaults to `1e-6`.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(
        self,
        grid,
        patch_size,
        channels,
        data_format,
        layer_norm_epsilon=1e-6,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.grid = tuple(grid)
        self.patch_size = tuple(patch_size)
        self.channels = channels
        self.data_format = data_format
        self.layer_norm_epsilon = layer_norm_epsilon
        self.norm = plain_norm(layer_norm_epsilon, self.dtype_policy, "norm")
        self.dense = keras.layers.Dense(
            self.patch_size[0] * self.patch_size[1] * channels,
            kernel_initializer="zeros",
            dtype=self.dtype_policy,
            name="dense",
        )

    def build(self, inputs_shape, condition_shape):
        self.norm.build(inputs_shape)
        self.modulation = modulation(2 * inputs_shape[-1], self.dtype_policy)
        self.modulation.build(condition_shape)
        self.dense.build(inputs_shape)

    def call(self, inputs, condition):
        shift, scale = modulation_parts(self.modulation, condition, 2)
        x = self.dense(self.norm(inputs) * (1 + scale) + shift)
        (rows, columns), (height, width) = self.grid, self.patch_size
        x = ops.reshape(x, (-1, rows, columns, height, width, self.channels))
        size = (rows * height, columns * width)
        if self.data_format == "channels_first":
            x = ops.transpose(x, (0, 5, 1, 3, 2, 4))
            return ops.reshape(x, (-1, self.channels, *size))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        return ops.reshape(x, (-1, *size, self.channels))

    def compute_output_shape(self, inputs_shape, condition_shape):
        (rows, columns), (height, width) = self.grid, self.patch_size
        size = (rows * height, columns * width)
        if self.data_format == "channels_first":
            return (inputs_shape[0], self.channels, *size)
        return (inputs_shape[0], *size, self.channels)

    def get_config(self):
        return {
            **super().get_config(),
            "grid": self.grid,
            "patch_size": self.patch_size,
            "channels": self.channels,
            "data_format": self.data_format,
            "layer_norm_epsilon": self.layer_norm_epsilon,
        }
