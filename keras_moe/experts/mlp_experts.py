import keras

from keras_moe.checks import check_bool
from keras_moe.experts.feed_forward_experts import FeedForwardExperts


@keras.saving.register_keras_serializable("keras_moe")
class MLPExperts(FeedForwardExperts):
    """A bank of two-layer feed-forward networks.

    ```
    hidden = activation(x @ up_kernel[e] + up_bias[e])
    y      = hidden @ down_kernel[e] + down_bias[e]
    ```

    for a row `x` of expert `e`. Only the chosen expert is computed for a row.

    Args:
        num_experts: int. Number of experts in the bank.
        intermediate_dim: int. Width of each expert's hidden layer.
        activation: Any Keras activation, `"gelu_tanh"` (V-MoE),
            `"quick_gelu"` or `"relu_squared"` (Nemotron). Defaults to
            `"relu"`.
        use_bias: bool. Whether both layers have a bias. Defaults to `True`.
        use_output_bias: bool, or `None` for `use_bias`. Whether the second
            layer has one. Defaults to `None`.
        output_dim: int, or `None` for the width of the input. Defaults to
            `None`.
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
        `(N, D)`, or `(N, output_dim)`.

    Weights:
        `up_kernel` `(E, D, F)`, `up_bias` `(E, F)`, `down_kernel` `(E, F, D)`,
        `down_bias` `(E, D)`. `output_dim` replaces `D` in the last two.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> experts = keras_moe.experts.MLPExperts(2, intermediate_dim=16)
    >>> rows = keras.ops.ones((5, 4))
    >>> tuple(experts(rows, keras.ops.array([3, 2], "int32")).shape)
    (5, 4)

    Reference:

    - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2
    """

    hidden_layers = ("up",)

    def __init__(
        self,
        num_experts,
        intermediate_dim,
        activation="relu",
        use_bias=True,
        use_output_bias=None,
        **kwargs,
    ):
        super().__init__(
            num_experts, intermediate_dim, activation, use_bias, **kwargs
        )
        if use_output_bias is not None:
            check_bool("use_output_bias", use_output_bias)
        self.use_output_bias = use_output_bias

    def has_bias(self, name):
        if name != "down" or self.use_output_bias is None:
            return self.use_bias
        return self.use_output_bias

    def join_hidden(self, up):
        return self.activation(up)

    join_hidden.is_by_unit = True

    def get_config(self):
        return {**super().get_config(), "use_output_bias": self.use_output_bias}
