import keras
from keras import ops

from keras_moe.losses.routing_loss import RoutingLoss
from keras_moe.ops.masking import masked_mean
from keras_moe.ops.routing import expert_counts


@keras.saving.register_keras_serializable("keras_moe")
class LoadBalancingLoss(RoutingLoss):
    """The load balancing loss of GShard and the Switch Transformer.

    ```
    f[e] = share of all assignments that went to expert e    (sums to 1)
    P[e] = mean over tokens of the probability of expert e   (sums to 1)
    loss = num_experts * sum(f * P)
    ```

    At perfect balance the loss is 1, whatever `top_k`: all `top_k` choices
    count in `f`, divided by `top_k`. (HF transformers does not divide: its
    value is `top_k` times as large, and its coefficient must be multiplied by
    `top_k` here.) Assignments count before any is dropped for lack of
    capacity. Probabilities that do not sum to one, as sigmoid scores do not,
    are divided by their sum first. The gradient flows through `P` alone.

    Without a token the loss is 0.

    Args:
        weight: float. Factor of the loss. Defaults to `1e-2`.

    Call arguments:
        routing: A `keras_moe.routers.Routing`.
        mask: Boolean tensor of shape `(T,)`, or `None`. `False` tokens do not
            count.

    Example:

    >>> probs = keras.ops.eye(2)
    >>> routing = keras_moe.routers.Routing(
    ...     logits=probs,
    ...     probs=probs,
    ...     expert_indices=keras.ops.array([[0], [1]], "int32"),
    ...     expert_weights=keras.ops.ones((2, 1)),
    ... )
    >>> float(keras_moe.losses.LoadBalancingLoss(weight=1.0)(routing))
    1.0

    Reference:

    - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), equations 4 to 6
    """

    def __init__(self, weight=1e-2):
        super().__init__(weight)

    def call(self, routing, mask=None):
        num_experts = routing.probs.shape[-1]
        counts = expert_counts(routing, num_experts, mask)  # (E,)
        share = counts / ops.maximum(ops.sum(counts), 1.0)
        probs = ops.cast(routing.probs, "float32")
        total = ops.sum(probs, axis=-1, keepdims=True)
        probs = masked_mean(probs / ops.maximum(total, 1e-20), mask)
        return num_experts * ops.sum(ops.stop_gradient(share) * probs)
