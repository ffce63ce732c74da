import keras
from keras import ops

from keras_moe.checks import check_int
from keras_moe.losses.grouped_loss import GroupedLoss
from keras_moe.ops.assignments import counts_by_expert
from keras_moe.ops.assignments import expert_scores


@keras.saving.register_keras_serializable("keras_moe")
class DeviceBalanceLoss(GroupedLoss):
    """The device-level balance loss of DeepSeek-V2.

    ```
    f[d] = share of all assignments that went to experts of device d
    P[d] = mean over tokens of the probability of the experts of device d
    loss = num_devices * sum(f * P)
    ```

    Device `d` has `num_experts / num_devices` experts next to each other.
    At perfect balance of the devices the loss is 1, whatever `top_k` is and
    however unequal the loads within a device are. If all tokens are certain to
    go to one device, it is `num_devices`. The gradient flows through `P` alone.
    Probabilities are divided by their sum first. Without a token the loss is 0.

    Args:
        num_devices: int, a divisor of the number of experts.
        weight: float. Factor of the loss. Defaults to `0.05`.
        per: Groups of tokens that have a loss each: all tokens of the
            `"batch"`, those of each `"sequence"`, or of an int number of
            sequences. The loss is the mean over the groups that have a token.
            Defaults to `"batch"`.

    Call arguments:
        routing: A `keras_moe.routers.Routing`.
        mask: Boolean tensor of shape `(T,)`, or `None`. `False` tokens do not
            count.
        num_sequences: int. Number of sequences of equal length that the tokens
            are. Defaults to `1`.

    Raises:
        ValueError: If an argument is out of range, the sequences do not make
            up whole groups, or the experts do not make up whole devices.

    Example:

    >>> probs = keras.ops.eye(4)
    >>> routing = keras_moe.routers.Routing(
    ...     logits=probs,
    ...     probs=probs,
    ...     expert_indices=keras.ops.array([[0], [1], [2], [3]], "int32"),
    ...     expert_weights=keras.ops.ones((4, 1)),
    ... )
    >>> loss = keras_moe.losses.DeviceBalanceLoss(num_devices=2, weight=1.0)
    >>> float(loss(routing))
    1.0

    Reference:

    - [DeepSeek-AI, 2024](https://arxiv.org/abs/2405.04434), section 2.2.3
      (device-level balance loss)
    """

    def __init__(self, num_devices, weight=0.05, per="batch"):
        super().__init__(weight, per)
        check_int("num_devices", num_devices, minimum=1)
        self.num_devices = num_devices

    def check_router(self, router):
        self.experts_per_device(router.num_experts)

    def experts_per_device(self, num_experts):
        if num_experts % self.num_devices:
            raise ValueError(
                "`num_devices` must be a divisor of the number of experts. "
                f"Received: num_devices={self.num_devices}, "
                f"num_experts={num_experts}"
            )
        return num_experts // self.num_devices

    def group_losses(self, routing, mask, groups):
        share = ops.stop_gradient(self.device_shares(routing, mask, groups))
        scores = expert_scores(routing, "router", mask)  # (T, E)
        size = self.experts_per_device(scores.shape[-1])
        scores = ops.reshape(scores, (-1, self.num_devices, size))
        scores = self.means(
            ops.sum(scores, axis=-1), mask, groups
        )  # (G, num_devices)
        return self.num_devices * ops.sum(share * scores, axis=-1)

    def device_shares(self, routing, mask, groups):
        """`(G, num_devices)`."""
        size = self.experts_per_device(routing.probs.shape[-1])
        # The expert of a missing choice gives a device that does not exist.
        devices = ops.floor_divide(routing.expert_indices, size)
        counts = counts_by_expert(devices, self.num_devices, mask, groups)
        counts = self.over_devices(counts)
        total = ops.sum(counts, axis=-1, keepdims=True)
        return counts / ops.maximum(total, 1.0)

    def get_config(self):
        return {**super().get_config(), "num_devices": self.num_devices}
