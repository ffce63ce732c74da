import keras
from keras import ops

from keras_moe.checks import check_at_least
from keras_moe.checks import is_int


@keras.saving.register_keras_serializable("keras_moe")
class OrthogonalityRegularizer(keras.regularizers.Regularizer):
    """Mean squared cosine between the weights of different experts.

    ```
    cosine[i, j] = <w[i], w[j]> / (|w[i]| * |w[j]|)
    loss         = weight * mean over i != j of cosine[i, j] ** 2
    ```

    It keeps experts apart, in a router's kernel or in their own weights. It
    does not measure balance: it is 0 if the experts' vectors are orthogonal,
    and `weight` if all are parallel. More than `D` vectors of `D` numbers
    cannot be orthogonal; the smallest value for `E` of them is
    `weight * (E - D) / (D * (E - 1))`. With a single expert it is 0. A vector
    of zeros counts as orthogonal to all.

    Args:
        weight: float. Factor of the loss. Defaults to `1e-2`.
        expert_axis: int. The axis of the experts: `-1` for the `(D, E)` kernel
            of a router, `0` for banks of experts, `(E, ...)`. Defaults to `-1`.

    Raises:
        ValueError: If `weight` is negative, or there is no such axis.

    Example:

    >>> regularizer = keras_moe.losses.OrthogonalityRegularizer(weight=1.0)
    >>> kernels = keras.ops.eye(3), keras.ops.ones((3, 3))
    >>> [round(float(regularizer(kernel)), 4) for kernel in kernels]
    [0.0, 1.0]

    >>> router = keras_moe.routers.TopKRouter(
    ...     4, kernel_regularizer=keras_moe.losses.OrthogonalityRegularizer()
    ... )
    """

    def __init__(self, weight=1e-2, expert_axis=-1):
        check_at_least("weight", weight, 0)
        if not is_int(expert_axis):
            raise ValueError(
                "`expert_axis` must be an int. "
                f"Received: expert_axis={expert_axis!r}"
            )
        self.weight = weight
        self.expert_axis = expert_axis

    def __call__(self, x):
        rank = len(x.shape)
        if not -rank <= self.expert_axis < rank:
            raise ValueError(
                "`expert_axis` must be an axis of the weights. Received: "
                f"expert_axis={self.expert_axis}, shape={tuple(x.shape)}"
            )
        x = ops.moveaxis(ops.convert_to_tensor(x), self.expert_axis, 0)
        num_experts = x.shape[0]
        dtype = keras.backend.standardize_dtype(x.dtype)
        dtype = dtype if dtype == "float64" else "float32"
        x = ops.cast(ops.reshape(x, (num_experts, -1)), dtype)  # (E, N)
        # Scaled first: squares of small weights underflow in float32.
        largest = ops.max(ops.abs(x), axis=-1, keepdims=True)
        largest = ops.stop_gradient(largest)
        x = x / ops.where(largest > 1e-30, largest, ops.ones_like(largest))
        squares = ops.sum(ops.square(x), axis=-1, keepdims=True)
        squares = ops.where(squares > 1e-30, squares, ops.ones_like(squares))
        x = x * ops.rsqrt(squares)
        # On torch `ops.matmul` would make float32 of float64.
        cosines = ops.einsum("in,jn->ij", x, x)
        cosines = cosines * (1 - ops.eye(num_experts, dtype=dtype))
        pairs = max(num_experts * (num_experts - 1), 1)
        return self.weight * ops.sum(ops.square(cosines)) / pairs

    def get_config(self):
        return {"weight": self.weight, "expert_axis": self.expert_axis}
