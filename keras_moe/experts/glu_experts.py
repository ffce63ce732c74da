import keras

from keras_moe.experts.feed_forward_experts import FeedForwardExperts


@keras.saving.register_keras_serializable("keras_moe")
class GLUExperts(FeedForwardExperts):
    """A bank of gated feed-forward networks, SwiGLU by default.

    ```
    gate = x @ gate_kernel[e] + gate_bias[e]
    up   = x @ up_kernel[e] + up_bias[e]
    y    = (activation(gate) * up) @ down_kernel[e] + down_bias[e]
    ```

    for a row `x` of expert `e`. Only the chosen expert is computed for a row.

    Args:
        num_experts: int. Number of experts in the bank.
        intermediate_dim: int. Width of each expert's hidden layer.
        activation: Any Keras activation. Defaults to `"silu"`.
        use_bias: bool. Whether the three layers have a bias. Defaults to
            `False`.
        dropout: float. Rate of the dropout of the hidden layer, in training.
            Defaults to `0.0`.
        seed: int, or `None`. Seed of the dropout. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.experts.Experts`: initializers,
            regularizers, constraints, `implementation`.

    Call arguments:
        rows: Tensor of shape `(N, D)`, the rows of expert 0 first.
        group_sizes: int32 tensor of shape `(E,)`. Rows of each expert.
        training: bool. Whether to apply dropout.

    Input shape:
        `(N, D)`

    Output shape:
        `(N, D)`

    Weights:
        `gate_kernel` and `up_kernel` `(E, D, F)`, `down_kernel` `(E, F, D)`,
        and with `use_bias` `gate_bias`, `up_bias` `(E, F)`, `down_bias`
        `(E, D)`.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> experts = keras_moe.experts.GLUExperts(2, intermediate_dim=16)
    >>> rows = keras.ops.ones((5, 4))
    >>> tuple(experts(rows, keras.ops.array([3, 2], "int32")).shape)
    (5, 4)

    Reference:

    - [Shazeer, 2020](https://arxiv.org/abs/2002.05202), equation 6
    """

    def __init__(
        self,
        num_experts,
        intermediate_dim,
        activation="silu",
        use_bias=False,
        **kwargs,
    ):
        super().__init__(
            num_experts, intermediate_dim, activation, use_bias, **kwargs
        )

    def build_hidden(self, input_dim):
        self.gate_kernel, self.gate_bias = self.add_dense(
            "gate", input_dim, self.intermediate_dim
        )
        self.up_kernel, self.up_bias = self.add_dense(
            "up", input_dim, self.intermediate_dim
        )

    def hidden(self, rows, group_sizes):
        gate = self.grouped_dense(
            rows, group_sizes, self.gate_kernel, self.gate_bias
        )
        up = self.grouped_dense(rows, group_sizes, self.up_kernel, self.up_bias)
        return self.activation(gate) * up
