import keras
from keras import ops

from keras_moe.checks import check_int_up_to
from keras_moe.losses.device_balance_loss import DeviceBalanceLoss


@keras.saving.register_keras_serializable("keras_moe")
class CommunicationBalanceLoss(DeviceBalanceLoss):
    """The communication balance loss of DeepSeek-V2.

    ```
    f[d] = share of the tokens that are sent to device d, over max_devices
    P[d] = mean over tokens of the probability of the experts of device d
    loss = num_devices * sum(f * P)
    ```

    A token is sent to a device once, however many of its experts are there.
    Device `d` has `num_experts / num_devices` experts next to each other.
    At perfect balance of the devices the loss is 1 if every token is sent to
    `max_devices` of them, and less if to fewer. The gradient flows through `P`
    alone.
    Probabilities are divided by their sum first. Without a token the loss is 0.

    Args:
        num_devices: int, a divisor of the number of experts.
        max_devices: int. The most devices that a token is sent to: the
            `top_k_groups` of the router.
        weight: float. Factor of the loss. Defaults to `0.02`.
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
    ...     expert_indices=keras.ops.array([[0, 2]] * 4, "int32"),
    ...     expert_weights=keras.ops.ones((4, 2)),
    ... )
    >>> loss = keras_moe.losses.CommunicationBalanceLoss(
    ...     num_devices=2, max_devices=2, weight=1.0
    ... )
    >>> float(loss(routing))
    1.0

    Reference:

    - [DeepSeek-AI, 2024](https://arxiv.org/abs/2405.04434), section 2.2.3
      (communication balance loss)
    """

    def __init__(self, num_devices, max_devices, weight=0.02, per="batch"):
        super().__init__(num_devices, weight, per)
        check_int_up_to("max_devices", max_devices, "num_devices", num_devices)
        self.max_devices = max_devices

    def device_shares(self, routing, mask, groups):
        size = self.experts_per_device(routing.probs.shape[-1])
        devices = ops.floor_divide(routing.expert_indices, size)  # (T, K)
        devices = ops.cast(ops.expand_dims(devices, -1), "int32")
        each = ops.arange(self.num_devices, dtype="int32")
        sent = ops.any(ops.equal(devices, each), axis=1)  # (T, num_devices)
        sent = ops.cast(sent, "float32")
        return self.means(sent, mask, groups) / self.max_devices

    def get_config(self):
        return {**super().get_config(), "max_devices": self.max_devices}
