from keras import ops

from keras_moe import backend
from keras_moe.losses.routing_loss import RoutingLoss
from keras_moe.ops.groups import check_per
from keras_moe.ops.groups import num_groups
from keras_moe.ops.masking import group_means
from keras_moe.ops.masking import token_counts


class GroupedLoss(RoutingLoss):
    """Base class of routing losses that look at several tokens at once.

    A subclass computes one number for each group of tokens in
    `group_losses(routing, mask, groups)`, `(G,)` float32, from a `mask` `(T,)`
    or `None`. The loss is the mean over the groups that have a token.

    Where several devices train together, the batch is the one of all of them.
    A sum over tokens must then go through `self.over_devices`, a mean comes
    from `self.means`. Groups of sequences stay on their device, and the mean
    over the groups is taken over those of all devices.

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
        if mask is not None:
            mask = ops.cast(mask, "bool")
        losses = self.group_losses(routing, mask, groups)
        if mask is None:
            mask = ops.ones_like(routing.expert_indices[:, 0], dtype="bool")
        counts = token_counts(mask, groups, self.per == "batch")
        losses = ops.where(counts > 0, losses, ops.zeros_like(losses))
        total = ops.sum(losses)
        present = ops.sum(ops.cast(counts > 0, "float32"))
        if self.per not in ("batch", "global"):
            total = backend.all_reduce_sum(total)
            present = backend.all_reduce_sum(present)
        return total / ops.maximum(present, 1.0)

    def over_devices(self, sums):
        """Sums over tokens `(G, ...)`, added up if the group is the batch."""
        return backend.all_reduce_sum(sums) if self.per == "batch" else sums

    def means(self, values, mask, groups):
        """Means over tokens `(T, ...)` -> `(G, ...)`; 0 without a token."""
        return group_means(values, mask, groups, self.per == "batch")

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
