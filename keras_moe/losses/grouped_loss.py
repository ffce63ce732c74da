from keras import ops

from keras_moe.losses.routing_loss import RoutingLoss
from keras_moe.ops.groups import check_per
from keras_moe.ops.groups import num_groups
from keras_moe.ops.masking import token_counts


class GroupedLoss(RoutingLoss):
    """Base class of routing losses that look at several tokens at once.

    A subclass computes one number for each group of tokens in
    `group_losses(routing, mask, groups)`, `(G,)` float32, from a `mask` `(T,)`
    or `None`. The loss is the mean over the groups that have a token.

    Args:
        weight: float. Factor of the loss, not negative.
        per: Groups of tokens that have a loss each: all tokens of the
            `"batch"`, those of each `"sequence"`, or of an int number of
            sequences. Defaults to `"batch"`.

    Raises:
        ValueError: If an argument is out of range.
    """

    uses_sequences = True

    def __init__(self, weight, per="batch"):
        super().__init__(weight)
        check_per(per)
        self.per = per

    def call(self, routing, mask=None, num_sequences=1):
        groups = _at_least_one(self.num_groups(num_sequences))
        if mask is None:
            losses = self.group_losses(routing, None, groups)
            num_tokens = ops.shape(routing.expert_indices)[0]
            if isinstance(num_tokens, int) and num_tokens > 0:
                return ops.mean(losses)
            mask = ops.ones_like(routing.expert_indices[:, 0], dtype="bool")
        else:
            mask = ops.cast(mask, "bool")
            losses = self.group_losses(routing, mask, groups)
        counts = token_counts(mask, groups)
        losses = ops.where(counts > 0, losses, ops.zeros_like(losses))
        present = ops.sum(ops.cast(counts > 0, "float32"))
        return ops.sum(losses) / ops.maximum(present, 1.0)

    def num_groups(self, num_sequences):
        return num_groups(self.per, num_sequences)

    def group_losses(self, routing, mask, groups):
        raise NotImplementedError(
            f"{type(self).__name__} must define "
            "`group_losses(routing, mask, groups)`."
        )

    def get_config(self):
        return {**super().get_config(), "per": self.per}


def _at_least_one(groups):
    # A batch without a sequence is one empty group, as T is divided by G.
    if isinstance(groups, int):
        return max(groups, 1)
    return ops.maximum(groups, 1) if ops.is_tensor(groups) else groups
