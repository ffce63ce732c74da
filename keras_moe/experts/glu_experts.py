import keras
from keras import ops

from keras_moe.checks import check_number
from keras_moe.checks import is_number
from keras_moe.experts.feed_forward_experts import FeedForwardExperts


@keras.saving.register_keras_serializable("keras_moe")
class GLUExperts(FeedForwardExperts):
    """A bank of gated feed-forward networks, SwiGLU by default.

    ```
    gate = x @ gate_kernel[e] + gate_bias[e]
    up   = x @ up_kernel[e] + up_bias[e]
    gate = minimum(gate, limit)
    up   = clip(up, -limit, limit) + up_shift
    y    = (activation(gate) * up) @ down_kernel[e] + down_bias[e]
    ```

    for a row `x` of expert `e`. Only the chosen expert is computed for a row.

    gpt-oss has `activation="quick_gelu"`, `limit=7.0`, `up_shift=1.0` and
    `use_bias=True`; DeepSeek-V4 has only a `limit`. Some models store gate and
    up in one matrix, side by side or with alternating columns. Here they are
    two variables.

    Args:
        num_experts: int. Number of experts in the bank.
        intermediate_dim: int. Width of each expert's hidden layer.
        activation: Any Keras activation, `"gelu_tanh"`, `"quick_gelu"` or
            `"relu_squared"`.
            Defaults to `"silu"`.
        use_bias: bool. Whether the three layers have a bias. Defaults to
            `False`.
        limit: float, or `None`. Upper bound of `gate`, and bound of `up` on
            both sides. Defaults to `None`.
        up_shift: float. Added to `up`. Defaults to `0.0`.
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
        `gate_kernel` and `up_kernel` `(E, D, F)`, `down_kernel` `(E, F, D)`,
        and with `use_bias` `gate_bias`, `up_bias` `(E, F)`, `down_bias`
        `(E, D)`. With `output_dim`, it replaces `D` in the `down` weights.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> experts = keras_moe.experts.GLUExperts(2, intermediate_dim=16)
    >>> rows = keras.ops.ones((5, 4))
    >>> tuple(experts(rows, keras.ops.array([3, 2], "int32")).shape)
    (5, 4)

    Reference:

    - [Shazeer, 2020](https://arxiv.org/abs/2002.05202), equation 6
    - [OpenAI, 2025](https://arxiv.org/abs/2508.10925), gpt-oss (`limit`,
      `up_shift`)
    """

    hidden_layers = ("gate", "up")

    def __init__(
        self,
        num_experts,
        intermediate_dim,
        activation="silu",
        use_bias=False,
        limit=None,
        up_shift=0.0,
        **kwargs,
    ):
        super().__init__(
            num_experts, intermediate_dim, activation, use_bias, **kwargs
        )
        if limit is not None and limit != float("inf"):
            if not is_number(limit) or limit <= 0:
                raise ValueError(
                    "`limit` must be positive or None. "
                    f"Received: limit={limit!r}"
                )
        check_number("up_shift", up_shift)
        self.limit = limit
        self.up_shift = up_shift

    def join_hidden(self, gate, up):
        if self.limit is not None:
            # On torch, `ops.minimum` and `ops.clip` turn float64 into float32.
            limit = ops.full_like(gate, self.limit)
            gate = ops.where(gate > limit, limit, gate)
            up = ops.where(up > limit, limit, up)
            up = ops.where(up < -limit, -limit, up)
        if self.up_shift:
            up = up + self.up_shift
        return self.activation(gate) * up

    join_hidden.is_by_unit = True

    def get_config(self):
        return {
            **super().get_config(),
            "limit": self.limit,
            "up_shift": self.up_shift,
        }
