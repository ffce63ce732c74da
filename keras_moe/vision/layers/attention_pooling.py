import keras
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_positive
from keras_moe.vision.layers.attention import VisionAttention
from keras_moe.vision.layers.attention import VisionMLP


@keras.saving.register_keras_serializable("keras_moe")
class AttentionPooling(keras.layers.Layer):
    """One vector for each image, by the attention of one learned query.

    ```
    a = attention(query=probe, keys and values=tokens)
    y = a + mlp(layer_norm(a))
    ```

    Args:
        num_heads: int. Attention heads; must divide the tokens' width.
        mlp_dim: int. Width of the hidden layer.
        qk_norm: bool. Whether each head normalizes queries and keys. Defaults
            to `False`.
        layer_norm_epsilon: float. Defaults to `1e-6`.
        activation: Activation of the hidden layer. Defaults to `"gelu_tanh"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        `(batch, tokens, D)`

    Output shape:
        `(batch, D)`

    Raises:
        ValueError: If an argument is out of range, or `num_heads` does not
            divide `D`.

    Example:

    >>> layer = keras_moe.layers.AttentionPooling(num_heads=2, mlp_dim=16)
    >>> tuple(layer(keras.ops.ones((3, 5, 8))).shape)
    (3, 8)

    Reference:

    - [Zhai et al., 2021](https://arxiv.org/abs/2106.04560), section 3.2
    """

    def __init__(
        self,
        num_heads,
        mlp_dim,
        qk_norm=False,
        layer_norm_epsilon=1e-6,
        activation="gelu_tanh",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_int("num_heads", num_heads, 1)
        check_int("mlp_dim", mlp_dim, 1)
        check_bool("qk_norm", qk_norm)
        check_positive("layer_norm_epsilon", layer_norm_epsilon)
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.qk_norm = qk_norm
        self.layer_norm_epsilon = layer_norm_epsilon
        self.norm = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=self.dtype_policy, name="norm"
        )
        self.mlp = VisionMLP(
            mlp_dim, activation, dtype=self.dtype_policy, name="mlp"
        )

    def build(self, input_shape):
        dim = input_shape[-1]
        self.probe = self.add_weight(
            name="probe", shape=(1, 1, dim), initializer="glorot_uniform"
        )
        self.attention = VisionAttention(
            self.num_heads,
            head_dim(dim, self.num_heads),
            qk_norm=self.qk_norm,
            qk_norm_epsilon=self.layer_norm_epsilon,
            dtype=self.dtype_policy,
            name="attention",
        )
        pooled = (input_shape[0], 1, dim)
        self.attention.build(pooled, input_shape)
        self.norm.build(pooled)
        self.mlp.build(pooled)

    def call(self, inputs, training=None):
        probe = ops.cast(self.probe, inputs.dtype)
        shape = (ops.shape(inputs)[0], 1, inputs.shape[-1])
        x = self.attention(
            ops.broadcast_to(probe, shape), inputs, training=training
        )
        x = x + self.mlp(self.norm(x), training=training)
        return x[:, 0]

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[-1])

    def get_config(self):
        mlp = self.mlp.get_config()
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "qk_norm": self.qk_norm,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "activation": mlp["activation"],
        }


def head_dim(dim, num_heads):
    """The width of a head."""
    if dim % num_heads:
        raise ValueError(
            "`num_heads` must divide the width of the tokens. Received: "
            f"num_heads={num_heads}, a width of {dim}"
        )
    return dim // num_heads
