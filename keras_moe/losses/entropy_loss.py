import keras
from keras import ops

from keras_moe.checks import check_one_of
from keras_moe.checks import is_int
from keras_moe.checks import is_number
from keras_moe.losses.grouped_loss import GroupedLoss
from keras_moe.ops.assignments import expert_scores
from keras_moe.ops.balance import entropy

KINDS = ("token", "marginal")


@keras.saving.register_keras_serializable("keras_moe")
class EntropyLoss(GroupedLoss):
    """Entropy of the router's probabilities, of each token or of their mean.

    ```
    kind="token":     loss = mean over tokens of H(probs)
    kind="marginal":  loss = -H(mean over tokens of probs)
                      loss = max(0, threshold - H(...))    with a threshold
    H(p) = -sum(p * log(p))
    ```

    The first makes the router sure of each token. It does not measure balance:
    it is 0 if the router is sure of all tokens, and `log(num_experts)` if all
    probabilities are equal. The second balances the experts: at perfect balance
    it is `-log(num_experts)`, with a threshold 0; at collapse it is 0, with a
    threshold that threshold.

    With `modality`, one object for each modality, these are the local and the
    global entropy loss of LIMoE. `exp(threshold)` is the smallest number of
    experts that a modality is to use.

    Probabilities are divided by their sum first. Without a token the loss is 0.

    Args:
        weight: float. Factor of the loss. Defaults to `1e-2`.
        kind: `"token"` or `"marginal"`. Defaults to `"token"`.
        threshold: float, or `None`. With `kind="marginal"`, the entropy above
            which the loss is 0. Defaults to `None`.
        modality: int, or `None`. Only tokens whose context is this number
            count; with `None` all do. Defaults to `None`.
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
        context: Integer tensor of shape `(T,)` or `(T, 1)`, the modality of
            each token, or `None`.

    Raises:
        ValueError: If an argument is out of range, the sequences do not make
            up whole groups, or `modality` is given and `context` is not.

    Example:

    >>> probs = keras.ops.eye(2)
    >>> routing = keras_moe.routers.Routing(
    ...     probs, probs, keras.ops.zeros((2, 1), "int32"), probs
    ... )
    >>> loss = keras_moe.losses.EntropyLoss(weight=1.0, kind="marginal")
    >>> round(float(loss(routing)), 4)
    -0.6931
    >>> loss = keras_moe.losses.EntropyLoss(modality=1)
    >>> float(loss(routing, context=keras.ops.array([0, 1])))
    0.0

    Reference:

    - [Mustafa et al., 2022](https://arxiv.org/abs/2206.02770), section 3.2
    """

    def __init__(
        self,
        weight=1e-2,
        kind="token",
        threshold=None,
        modality=None,
        per="batch",
    ):
        super().__init__(weight, per)
        check_one_of("kind", kind, KINDS)
        if threshold is not None and (
            kind != "marginal" or not is_number(threshold) or threshold <= 0
        ):
            raise ValueError(
                "`threshold` must be None, or positive with kind='marginal'. "
                f"Received: threshold={threshold!r}, kind={kind!r}"
            )
        if modality is not None and not is_int(modality):
            raise ValueError(
                "`modality` must be an int or None. "
                f"Received: modality={modality!r}"
            )
        self.kind = kind
        self.threshold = threshold
        self.modality = modality
        self.uses_context = modality is not None

    def call(self, routing, mask=None, num_sequences=1, context=None):
        if self.modality is not None:
            chosen = self._of_modality(context)
            mask = chosen if mask is None else ops.logical_and(mask, chosen)
        return super().call(routing, mask, num_sequences)

    def _of_modality(self, context):
        shape = None if context is None else tuple(context.shape)
        if shape is None or len(shape) > 2 or shape[1:] not in ((), (1,)):
            raise ValueError(
                "With `modality`, the loss needs the modality of each token "
                "as `context`, of shape (T,) or (T, 1). "
                f"Received: modality={self.modality}, context.shape={shape}"
            )
        return ops.equal(ops.reshape(context, (-1,)), self.modality)

    def group_losses(self, routing, mask, groups):
        probs = expert_scores(routing, "router", mask)  # (T, E)
        if self.kind == "token":
            return self.means(entropy(probs), mask, groups)
        marginal = entropy(self.means(probs, mask, groups))  # (G,)
        if self.threshold is None:
            return -marginal
        return ops.relu(self.threshold - marginal)

    def get_config(self):
        return {
            **super().get_config(),
            "kind": self.kind,
            "threshold": self.threshold,
            "modality": self.modality,
        }
