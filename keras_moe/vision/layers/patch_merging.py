import keras
from keras import ops

from keras_moe.checks import as_ints
from keras_moe.checks import check_positive


@keras.saving.register_keras_serializable("keras_moe")
class PatchMerging(keras.layers.Layer):
    """Makes one token of twice the width of four neighbours.

    ```
    y = layer_norm([top left, bottom left, top right, bottom right]) @ kernel
    ```

    Args:
        grid: Two even ints. Rows and columns of the tokens.
        layer_norm_epsilon: float. Defaults to `1e-5`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, rows * columns, D)`, the tokens in the order of rows.

    Output shape:
        `(batch, rows * columns / 4, 2 * D)`

    Raises:
        ValueError: If an argument is out of range, or does not fit the tokens.

    Example:

    >>> layer = keras_moe.layers.PatchMerging(grid=(4, 6))
    >>> tuple(layer(keras.ops.ones((2, 24, 8))).shape)
    (2, 6, 16)

    Reference:

    - [Liu et al., 2021](https://arxiv.org/abs/2103.14030), section 3.1
    """

    def __init__(self, grid, layer_norm_epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.grid = tuple(as_ints("grid", grid, 2, 1))
        if any(side % 2 for side in self.grid):
            raise ValueError(
                "`grid` must be two even ints, as four neighbours become one "
                f"token. Received: grid={grid}"
            )
        check_positive("layer_norm_epsilon", layer_norm_epsilon)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.norm = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=self.dtype_policy, name="norm"
        )

    def build(self, input_shape):
        _, tokens, dim = input_shape
        if tokens != self.grid[0] * self.grid[1]:
            raise ValueError(
                "`grid` must have as many places as there are tokens. "
                f"Received: grid={self.grid}, input_shape={tuple(input_shape)}"
            )
        merged = (None, tokens // 4, 4 * dim)
        self.norm.build(merged)
        self.reduction = keras.layers.Dense(
            2 * dim, use_bias=False, dtype=self.dtype_policy, name="reduction"
        )
        self.reduction.build(merged)

    def call(self, inputs):
        rows, columns = (side // 2 for side in self.grid)
        dim = inputs.shape[-1]
        x = ops.reshape(inputs, (-1, rows, 2, columns, 2, dim))
        x = ops.transpose(x, (0, 1, 3, 4, 2, 5))  # columns of a square first
        x = ops.reshape(x, (-1, rows * columns, 4 * dim))
        return self.reduction(self.norm(x))

    def compute_output_shape(self, input_shape):
        batch, tokens, dim = input_shape
        return (batch, tokens // 4, 2 * dim)

    def get_config(self):
        return {
            **super().get_config(),
            "grid": self.grid,
            "layer_norm_epsilon": self.layer_norm_epsilon,
        }
