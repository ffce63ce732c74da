import keras
from keras import ops

from keras_moe.losses.routing_loss import RoutingLoss
from keras_moe.ops.masking import masked_mean
from keras_moe.ops.masking import zero_masked


@keras.saving.register_keras_serializable("keras_moe")
class RouterZLoss(RoutingLoss):
    """The router z-loss of ST-MoE, which keeps the logits small.

    ```
    loss = mean over tokens of logsumexp(logits) ** 2
    ```

    It does not measure balance: with all logits zero it is
    `log(num_experts) ** 2`. Without a token it is 0.

    Args:
        weight: float. Factor of the loss. Defaults to `1e-3`.

    Call arguments:
        routing: A `keras_moe.routers.Routing`.
        mask: Boolean tensor of shape `(T,)`, or `None`. `False` tokens do not
            count.

    Raises:
        ValueError: If `weight` is negative or not finite.

    Example:

    >>> logits = keras.ops.zeros((3, 1))
    >>> routing = keras_moe.routers.Routing(
    ...     logits, logits, keras.ops.zeros((3, 1), "int32"), logits
    ... )
    >>> float(keras_moe.losses.RouterZLoss()(routing))
    0.0

    Reference:

    - [Zoph et al., 2022](https://arxiv.org/abs/2202.08906), equation 5
    """

    def __init__(self, weight=1e-3):
        super().__init__(weight)

    def call(self, routing, mask=None):
        logits = zero_masked(ops.cast(routing.logits, "float32"), mask)
        squares = ops.square(ops.logsumexp(logits, axis=-1))
        return masked_mean(squares, mask, all_reduce=True)
