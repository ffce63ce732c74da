import keras

from keras_moe.experts.experts import PlainExperts
from keras_moe.experts.grouped_rows import clear_unused_rows


@keras.saving.register_keras_serializable("keras_moe")
class CopyExperts(PlainExperts):
    """Experts that leave their token as it is: `y = x`.

    They have no weights and compute nothing: a token that chooses one uses one
    full expert less. They are combined with other experts in `MixedExperts`.
    LongCat-Flash calls them identity experts.

    Args:
        num_experts: int. Number of experts in the bank.
        name, dtype, trainable: As for `keras.layers.Layer`.

    Call arguments:
        rows: Tensor of shape `(N, ...)`, the rows of expert 0 first.
        group_sizes: int32 tensor of shape `(E,)`. Rows of each expert.

    Input shape:
        `(N, ...)`

    Output shape:
        Same as the input. Unused rows give zero.

    Raises:
        ValueError: If `num_experts` is not a positive int.

    Example:

    >>> experts = keras_moe.experts.CopyExperts(1)
    >>> rows = keras.ops.ones((3, 2))
    >>> float(keras.ops.sum(experts(rows, keras.ops.array([3], "int32"))))
    6.0

    Reference:

    - [Jin et al., 2024](https://arxiv.org/abs/2410.07348), section 3.1, copy
      experts
    """

    def build(self, rows_shape):
        pass

    def call(self, rows, group_sizes, training=None):
        return clear_unused_rows(rows, group_sizes)
