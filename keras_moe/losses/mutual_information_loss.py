import keras

from keras_moe.losses.grouped_loss import GroupedLoss
from keras_moe.ops.assignments import expert_scores
from keras_moe.ops.balance import entropy


@keras.saving.register_keras_serializable("keras_moe")
class MutualInformationLoss(GroupedLoss):
    """Minus the mutual information of tokens and experts.

    ```
    loss = mean over tokens of H(probs) - H(mean over tokens of probs)
    H(p) = -sum(p * log(p))
    ```

    Its minimum asks for both: a router that is sure of each token, and equal
    use of all experts. There the loss is `-log(num_experts)`. It is 0 if every
    token has the same probabilities, at collapse or not, and never positive.

    Probabilities are divided by their sum first. Without a token the loss is 0.

    Args:
        weight: float. Factor of the loss. Defaults to `1e-2`.
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
    ...     probs, probs, keras.ops.zeros((2, 1), "int32"), probs
    ... )
    >>> loss = keras_moe.losses.MutualInformationLoss(weight=1.0)
    >>> round(float(loss(routing)), 4)
    -0.6931

    Reference:

    - [Chen et al., 2022](https://arxiv.org/abs/2212.08066) (Mod-Squad, with
      tasks in the place of tokens)
    """

    def __init__(self, weight=1e-2, per="batch"):
        super().__init__(weight, per)

    def group_losses(self, routing, mask, groups):
        probs = expert_scores(routing, "router", mask)  # (T, E)
        of_tokens = self.means(entropy(probs), mask, groups)
        return of_tokens - entropy(self.means(probs, mask, groups))
