import keras
from keras import ops

from keras_moe.checks import as_keras_object


@keras.saving.register_keras_serializable("keras_moe")
class BalancedExperts(keras.layers.Layer):
    """Adds experts of domains, or of tasks, in learned proportions (M3oE).

    ```
    balance = sigmoid(balance_logit)               own versus the others
    mix[n]  = balance * experts[n]
              + (1 - balance) / (N - 1) * sum over the other m of experts[m]
    y[n]    = inputs[n] + sigmoid(weight_logit) * mix[n]
    ```

    Two scalars are learned. M3oE has two of these layers on the outputs of a
    `MultiGateMoE`: one adds the experts of domains, the next the experts of
    tasks.

    Args:
        initializer: Initializer of the two logits. Defaults to `"zeros"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, N, dim)`.
        experts: Tensor of shape `(batch, N, dim)`. The output of the expert of
            each domain or task.

    Input shape:
        `(batch, N, dim)`

    Output shape:
        The same as the input.

    Weights:
        `balance_logit`, unless `N` is 1, and `weight_logit`, scalars.

    Raises:
        ValueError: If the shapes differ, or are not of rank 3.

    Example:

    >>> layer = keras_moe.layers.BalancedExperts()
    >>> x = keras.ops.ones((2, 3, 4))
    >>> tuple(layer(x, x).shape)
    (2, 3, 4)

    Reference:

    - [Zhang et al., 2024](https://arxiv.org/abs/2404.18465)
    """

    def __init__(self, initializer="zeros", **kwargs):
        super().__init__(**kwargs)
        self.initializer = as_keras_object(
            "initializer", keras.initializers.get, initializer
        )

    def build(self, inputs_shape, experts_shape):
        first, second = tuple(inputs_shape), tuple(experts_shape)
        if len(first) != 3 or first[1] is None or first[1:] != second[1:]:
            raise ValueError(
                "`inputs` and `experts` must be of the same shape (batch, N, "
                f"dim). Received: inputs_shape={first}, experts_shape={second}"
            )
        self.balance_logit = None
        if first[1] > 1:
            self.balance_logit = self._add_scalar("balance_logit")
        self.weight_logit = self._add_scalar("weight_logit")

    def _add_scalar(self, name):
        return self.add_weight(
            name=name, shape=(), initializer=self.initializer
        )

    def call(self, inputs, experts):
        experts = ops.cast(experts, self.compute_dtype)
        number = experts.shape[1]
        mixed = experts
        if self.balance_logit is not None:
            balance = ops.sigmoid(ops.convert_to_tensor(self.balance_logit))
            rest = ops.sum(experts, axis=1, keepdims=True) - experts
            mixed = balance * experts + (1 - balance) / (number - 1) * rest
        weight = ops.sigmoid(ops.convert_to_tensor(self.weight_logit))
        return inputs + weight * mixed

    def compute_output_shape(self, inputs_shape, experts_shape):
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "initializer": keras.initializers.serialize(self.initializer),
        }
