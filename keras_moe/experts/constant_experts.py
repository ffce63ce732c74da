import keras
from keras import ops

from keras_moe.experts.experts import Experts
from keras_moe.experts.experts import as_part_of_bank
from keras_moe.experts.grouped_rows import clear_unused_rows
from keras_moe.ops.grouped_matmul import grouped_matmul


@keras.saving.register_keras_serializable("keras_moe")
class ConstantExperts(Experts):
    """Experts that mix their token with a learned constant.

    ```
    a0, a1 = softmax(x @ kernel[e])
    y      = a0 * x + a1 * constant[e]
    ```

    for a row `x` of expert `e`. They cost almost nothing, and are combined with
    other experts in `MixedExperts`.

    Args:
        num_experts: int. Number of experts in the bank.
        constant_initializer: Initializer of each expert's constant. Defaults to
            `"random_normal"`.
        constant_regularizer: Regularizer of each expert's constant. Defaults to
            `None`.
        constant_constraint: Constraint of each expert's constant. Defaults to
            `None`.
        **kwargs: Arguments of `keras_moe.experts.Experts`. Arguments for biases
            have no effect.

    Call arguments:
        rows: Tensor of shape `(N, D)`, the rows of expert 0 first.
        group_sizes: int32 tensor of shape `(E,)`. Rows of each expert.

    Input shape:
        `(N, D)`

    Output shape:
        `(N, D)`

    Weights:
        `kernel` `(E, D, 2)`, `constant` `(E, D)`.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> experts = keras_moe.experts.ConstantExperts(2)
    >>> rows = keras.ops.ones((5, 4))
    >>> tuple(experts(rows, keras.ops.array([3, 2], "int32")).shape)
    (5, 4)

    Reference:

    - [Jin et al., 2024](https://arxiv.org/abs/2410.07348), section 3.1,
      constant experts
    """

    def __init__(
        self,
        num_experts,
        constant_initializer="random_normal",
        constant_regularizer=None,
        constant_constraint=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        for name, given in (
            ("constant_initializer", constant_initializer),
            ("constant_regularizer", constant_regularizer),
            ("constant_constraint", constant_constraint),
        ):
            setattr(self, name, as_part_of_bank(name, given))

    def build(self, rows_shape):
        if len(rows_shape) != 2 or rows_shape[-1] is None:
            raise ValueError(
                "The rows of experts must be of shape (N, D) with a static D. "
                f"Received: rows_shape={tuple(rows_shape)}"
            )
        dim = rows_shape[-1]
        self.kernel = self.add_bank("kernel", (dim, 2))
        self.constant = self.add_bank("constant", (dim,), kind="constant")

    def call(self, rows, group_sizes, training=None):
        rows = clear_unused_rows(rows, group_sizes)
        # Without `implementation`, which may not take two columns.
        logits = grouped_matmul(rows, self.kernel, group_sizes)  # (N, 2)
        # A softmax of two numbers is a sigmoid of their difference.
        difference = logits[:, :1] - logits[:, 1:]
        constants = grouped_matmul(
            ops.sigmoid(-difference),
            ops.expand_dims(self.constant, 1),
            group_sizes,
        )
        # Without rows, the gradient of a broadcast sigmoid fails on TensorFlow.
        share = ops.broadcast_to(ops.sigmoid(difference), ops.shape(rows))
        return share * rows + constants

    def get_config(self):
        return {
            **super().get_config(),
            "constant_initializer": keras.initializers.serialize(
                self.constant_initializer
            ),
            "constant_regularizer": keras.regularizers.serialize(
                self.constant_regularizer
            ),
            "constant_constraint": keras.constraints.serialize(
                self.constant_constraint
            ),
        }
