import keras
from keras import ops

from keras_moe.experts.experts import PlainExperts


@keras.saving.register_keras_serializable("keras_moe")
class ZeroExperts(PlainExperts):
    """Experts that discard their token: `y = 0`.

    They have no weights and compute nothing. Combined with other experts in
    `MixedExperts`, they let a router spend less on easy tokens.

    Args:
        num_experts: int. Number of experts in the bank.
        name, dtype, trainable: As for `keras.layers.Layer`.

    Call arguments:
        rows: Tensor of shape `(N, ...)`, the rows of expert 0 first.
        group_sizes: int32 tensor of shape `(E,)`. Rows of each expert.

    Input shape:
        `(N, ...)`

    Output shape:
        Same as the input.

    Raises:
        ValueError: If `num_experts` is not a positive int.

    Example:

    >>> experts = keras_moe.experts.ZeroExperts(1)
    >>> rows = keras.ops.ones((3, 2))
    >>> float(keras.ops.sum(experts(rows, keras.ops.array([3], "int32"))))
    0.0

    Reference:

    - [Jin et al., 2024](https://arxiv.org/abs/2410.07348), section 3.1, zero
      experts
    """

    def build(self, rows_shape):
        pass

    def call(self, rows, group_sizes, training=None):
        return ops.zeros_like(rows)
