import keras
import numpy as np
from keras import ops

from keras_moe.checks import as_ints
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_rate
from keras_moe.vision.layers import windows
from keras_moe.vision.layers.attention_pooling import head_dim


@keras.saving.register_keras_serializable("keras_moe")
class WindowAttention(keras.layers.Layer):
    """Attention of the tokens of a grid within windows (Swin Transformer).

    ```
    q, k, v = tokens of a window @ qkv kernel + bias
    bias    = dense_2(relu(dense_1(log-spaced offset of the two places)))
    y       = softmax(q @ k / sqrt(head dim) + bias) @ v @ kernel + bias
    ```

    With a shift, windows begin so many rows and columns further down and to
    the right, and those at the border hold only what is left there. Windows
    that reach beyond the grid hold only its tokens: what fills them up is seen
    by none.

    Args:
        num_heads: int. Attention heads; must divide the tokens' width.
        grid: Two ints. Rows and columns of the tokens.
        window_size: int. Rows and columns of a window. On a smaller grid it is
            the shorter side, and nothing is shifted.
        shift: int, below `window_size`. Defaults to `0`.
        pretrained_window_size: int, or `None` for the window's own. Offsets
            are measured by a window of this size. Defaults to `None`.
        use_bias: bool. Whether queries, keys and values have a bias. Defaults
            to `True`.
        bias_hidden_dim: int. Width of the network of the position bias.
            Defaults to `512`.
        dropout: float. Rate of the dropout of attention weights. Defaults to
            `0.0`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, rows * columns, D)`, the tokens in the
            order of rows.
        training: bool. Whether to apply dropout.

    Input shape:
        `(batch, rows * columns, D)`

    Output shape:
        Same as the input.

    Raises:
        ValueError: If an argument is out of range, or does not fit the tokens.

    Example:

    >>> layer = keras_moe.layers.WindowAttention(
    ...     num_heads=2, grid=(6, 8), window_size=4, shift=2
    ... )
    >>> tuple(layer(keras.ops.ones((3, 48, 8))).shape)
    (3, 48, 8)

    Reference:

    - [Liu et al., 2021](https://arxiv.org/abs/2103.14030), section 3.2
    - [Liu et al., 2021](https://arxiv.org/abs/2111.09883), section 3.3 (the
      bias of log-spaced offsets)
    """

    def __init__(
        self,
        num_heads,
        grid,
        window_size,
        shift=0,
        pretrained_window_size=None,
        use_bias=True,
        bias_hidden_dim=512,
        dropout=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("num_heads", num_heads, 1)
        self.grid = tuple(as_ints("grid", grid, 2, 1))
        check_int("window_size", window_size, 1)
        check_int("shift", shift, 0)
        if shift >= window_size:
            raise ValueError(
                "`shift` must be below `window_size`. "
                f"Received: shift={shift}, window_size={window_size}"
            )
        if pretrained_window_size is not None:
            check_int("pretrained_window_size", pretrained_window_size, 1)
        check_bool("use_bias", use_bias)
        check_int("bias_hidden_dim", bias_hidden_dim, 1)
        check_rate("dropout", dropout)
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift = shift
        self.pretrained_window_size = pretrained_window_size
        self.use_bias = use_bias
        self.bias_hidden_dim = bias_hidden_dim
        self.dropout = dropout
        small = min(self.grid) <= window_size
        self._size = min(self.grid) if small else window_size
        self._shift = 0 if small else shift
        self.bias_1 = self._dense(bias_hidden_dim, "bias_1", activation="relu")
        self.bias_2 = self._dense(num_heads, "bias_2", use_bias=False)
        self._dropout = None
        if dropout:
            self._dropout = keras.layers.Dropout(
                dropout, dtype=self.dtype_policy
            )

    def _dense(self, units, name, **kwargs):
        return keras.layers.Dense(
            units, dtype=self.dtype_policy, name=name, **kwargs
        )

    def build(self, inputs_shape):
        _, tokens, dim = inputs_shape
        if tokens != self.grid[0] * self.grid[1]:
            raise ValueError(
                "`grid` must have as many places as there are tokens. "
                f"Received: grid={self.grid}, "
                f"inputs_shape={tuple(inputs_shape)}"
            )
        self._head_dim = head_dim(dim, self.num_heads)
        self.qkv = self._dense(3 * dim, "qkv", use_bias=self.use_bias)
        self.output_dense = self._dense(dim, "output")
        self.qkv.build(inputs_shape)
        self.output_dense.build(inputs_shape)
        self.bias_1.build((None, 2))
        self.bias_2.build((None, self.bias_hidden_dim))

    def call(self, inputs, training=None):
        x = windows.to_windows(inputs, self.grid, self._size, self._shift)
        number, places, dim = x.shape[1:]
        qkv = ops.reshape(
            self.qkv(x),
            (-1, number, places, 3, self.num_heads, self._head_dim),
        )
        queries, keys, values = (qkv[:, :, :, i] for i in range(3))
        # In half precision a softmax of logits with a bias is too coarse.
        exact = "float64" if self.compute_dtype == "float64" else "float32"
        logits = ops.einsum(
            "bwqhd,bwkhd->bwhqk", queries * self._head_dim**-0.5, keys
        )
        logits = ops.cast(logits, exact) + ops.cast(self.position_bias(), exact)
        seen = windows.visible(self.grid, self._size, self._shift)
        if seen is not None:
            hidden = np.where(seen, 0.0, -1e9)[:, None].astype(exact)
            logits = ops.add(logits, hidden)
        weights = ops.cast(ops.softmax(logits), self.compute_dtype)
        if self._dropout is not None:
            weights = self._dropout(weights, training=training)
        y = ops.einsum("bwhqk,bwkhd->bwqhd", weights, values)
        y = self.output_dense(ops.reshape(y, (-1, number, places, dim)))
        return windows.from_windows(y, self.grid, self._size, self._shift)

    def position_bias(self):
        """What is added to the logits of a window, `(heads, S * S, S * S)`."""
        offsets = windows.log_offsets(self._size, self.pretrained_window_size)
        bias = self.bias_2(self.bias_1(offsets))  # ((2 S - 1) ** 2, heads)
        bias = ops.take(bias, windows.offset_indices(self._size), axis=0)
        places = self._size**2
        bias = ops.reshape(bias, (places, places, self.num_heads))
        return ops.transpose(bias, (2, 0, 1))

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "grid": self.grid,
            "window_size": self.window_size,
            "shift": self.shift,
            "pretrained_window_size": self.pretrained_window_size,
            "use_bias": self.use_bias,
            "bias_hidden_dim": self.bias_hidden_dim,
            "dropout": self.dropout,
        }
