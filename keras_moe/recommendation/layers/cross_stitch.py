import keras
from keras import ops

from keras_moe.checks import check_number


@keras.saving.register_keras_serializable("keras_moe")
class CrossStitch(keras.layers.Layer):
    """Mixes the features of all tasks in learned proportions (cross-stitch).

    ```
    y[:, t] = sum over s of kernel[t, s] * x[:, s]
    ```

    The proportions do not depend on the input and are not normalized. At the
    start a task keeps `own` of its features, and the other tasks share the rest
    evenly.

    Args:
        own: float. Initial weight of a task's own features. Defaults to `0.9`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, num_tasks, dim)`.

    Input shape:
        `(batch, num_tasks, dim)`

    Output shape:
        The same as the input.

    Weights:
        `kernel` `(num_tasks, num_tasks)`.

    Raises:
        ValueError: If `own` is not a number, or the input is not of rank 3.

    Example:

    >>> layer = keras_moe.layers.CrossStitch()
    >>> tuple(layer(keras.ops.ones((2, 3, 4))).shape)
    (2, 3, 4)

    Reference:

    - [Misra et al., 2016](https://arxiv.org/abs/1604.03539)
    """

    def __init__(self, own=0.9, **kwargs):
        super().__init__(**kwargs)
        check_number("own", own)
        self.own = own

    def build(self, input_shape):
        if len(input_shape) != 3 or input_shape[1] is None:
            raise ValueError(
                "The input of CrossStitch must be of shape (batch, num_tasks, "
                "dim), with a static num_tasks. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        tasks = input_shape[1]
        self.kernel = self.add_weight(
            name="kernel", shape=(tasks, tasks), initializer=self._start
        )

    def _start(self, shape, dtype):
        tasks = shape[0]
        other = (1 - self.own) / max(tasks - 1, 1)
        own = self.own if tasks > 1 else 1.0
        return other + (own - other) * ops.eye(tasks, dtype=dtype)

    def call(self, inputs):
        inputs = ops.cast(inputs, self.compute_dtype)
        return ops.einsum("ts,bsd->btd", self.kernel, inputs)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {**super().get_config(), "own": self.own}
