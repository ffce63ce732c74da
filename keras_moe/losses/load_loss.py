import keras
from keras import ops

from keras_moe.checks import check_one_of
from keras_moe.losses.grouped_loss import GroupedLoss
from keras_moe.ops.balance import squared_variation


@keras.saving.register_keras_serializable("keras_moe")
class LoadLoss(GroupedLoss):
    """Squared coefficient of variation of the experts' smooth load.

    ```
    load[e] = sum over tokens of the probability that expert e is chosen if
              its noise is drawn anew
    loss    = variance(load) / mean(load) ** 2
    ```

    It needs a router that adds noise and tells how likely each choice was,
    `NoisyTopKRouter`; see `keras_moe.ops.expected_load`. Without noise the
    load consists of zeros and ones and has no gradient.

    At perfect balance the loss is 0. If all tokens are certain to go to the
    same `top_k` of `E` experts, it is `E / top_k - 1`. Without a token, or with
    a single expert, it is 0.

    Args:
        weight: float. Factor of the loss. Defaults to `0.1`, with which
            Shazeer et al. use it beside `ImportanceLoss`; V-MoE has `5e-3`.
        ddof: `0` for the population variance (V-MoE), `1` for the sample
            variance (FastMoE), `E / (E - 1)` times as large. Defaults to `0`.
        per: Groups of tokens that have a loss each: all tokens of the
            `"batch"`, those of each `"sequence"`, or of an int number of
            sequences. The loss is the mean over the groups that have a token.
            Defaults to `"batch"`.

    Call arguments:
        routing: A routing with a field `load`, `(T, E)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. `False` tokens do not
            count.
        num_sequences: int. Number of sequences of equal length that the tokens
            are. Defaults to `1`.

    Raises:
        ValueError: If an argument is out of range, the sequences do not make
            up whole groups, or the router gives no `load`.

    Example:

    ```python
    layer = keras_moe.layers.MoE(
        router=keras_moe.routers.NoisyTopKRouter(8, top_k=2),
        experts=keras_moe.experts.GLUExperts(8, intermediate_dim=32),
        losses=["importance", "load"],
    )
    ```

    Reference:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equations 8 to
      11
    """

    def __init__(self, weight=0.1, ddof=0, per="batch"):
        super().__init__(weight, per)
        check_one_of("ddof", ddof, (0, 1))
        self.ddof = ddof

    def check_router(self, router):
        made = router.routing_class
        if made is not None and not hasattr(made, "load"):
            raise ValueError(
                "`LoadLoss` needs a router whose routings have a field `load`, "
                "as `keras_moe.routers.NoisyTopKRouter`. "
                f"Received: router={router!r}"
            )

    def group_losses(self, routing, mask, groups):
        load = getattr(routing, "load", None)
        if load is None:
            raise ValueError(
                "`LoadLoss` needs a routing with a field `load`, as "
                "`keras_moe.routers.NoisyTopKRouter` returns it. "
                f"Received: routing={type(routing).__name__}"
            )
        load = self.means(ops.cast(load, "float32"), mask, groups)  # (G, E)
        return squared_variation(load, self.ddof)

    def get_config(self):
        return {**super().get_config(), "ddof": self.ddof}
