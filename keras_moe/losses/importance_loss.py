import keras
from keras import ops

from keras_moe.checks import check_one_of
from keras_moe.losses.grouped_loss import GroupedLoss
from keras_moe.ops.assignments import SCORES
from keras_moe.ops.assignments import expert_scores
from keras_moe.ops.assignments import sums_by_expert
from keras_moe.ops.balance import squared_variation


@keras.saving.register_keras_serializable("keras_moe")
class ImportanceLoss(GroupedLoss):
    """Squared coefficient of variation of the experts' importance.

    ```
    importance[e] = sum over tokens of the weight of expert e
    loss          = variance(importance) / mean(importance) ** 2
    ```

    At perfect balance the loss is 0; if one of `E` experts has all the
    importance it is `E - 1`, or `E` with `ddof=1`. Experts of equal importance
    may have different numbers of tokens; `LoadLoss` balances these.

    Without a token, or with a single expert, the loss is 0.

    Args:
        weight: float. Factor of the loss. Defaults to `0.1`, with which
            Shazeer et al. use it beside `LoadLoss`; V-MoE has `5e-3`.
        scores: The weights that count: `"weights"` the weights of the chosen
            experts (Shazeer et al., FastMoE), which have no gradient if they
            are normalized with `top_k=1`; `"softmax"` the softmax of the
            logits, without noise (V-MoE, Tutel); `"router"` the probabilities
            of the router, divided by their sum; `"raw"` the same as they are.
            Defaults to `"weights"`.
        ddof: `0` for the population variance (V-MoE), `1` for the sample
            variance (FastMoE, Tutel), `E / (E - 1)` times as large. Defaults
            to `0`.
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
        ValueError: If an argument is out of range, or the sequences do not
            make up whole groups.

    Example:

    >>> probs = keras.ops.eye(2)
    >>> routing = keras_moe.routers.Routing(
    ...     logits=probs,
    ...     probs=probs,
    ...     expert_indices=keras.ops.zeros((2, 1), "int32"),
    ...     expert_weights=keras.ops.ones((2, 1)),
    ... )
    >>> float(keras_moe.losses.ImportanceLoss(weight=1.0)(routing))
    1.0

    Reference:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equations 6
      and 7
    - [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), appendix A
    """

    def __init__(self, weight=0.1, scores="weights", ddof=0, per="batch"):
        super().__init__(weight, per)
        check_one_of("scores", scores, ("weights", *SCORES))
        check_one_of("ddof", ddof, (0, 1))
        self.scores = scores
        self.ddof = ddof

    def group_losses(self, routing, mask, groups):
        if self.scores == "weights":
            importance = self.over_devices(
                sums_by_expert(
                    ops.cast(routing.expert_weights, "float32"),
                    routing.expert_indices,
                    routing.probs.shape[-1],
                    mask,
                    groups,
                )
            )
        else:
            scores = expert_scores(routing, self.scores, mask)
            importance = self.means(scores, mask, groups)  # (G, E)
        return squared_variation(importance, self.ddof)

    def get_config(self):
        return {
            **super().get_config(),
            "scores": self.scores,
            "ddof": self.ddof,
        }
