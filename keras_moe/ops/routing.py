from typing import Any
from typing import NamedTuple

from keras import ops


class Routing(NamedTuple):
    """What a router decided: which experts each token goes to, and how much.

    Fields:
        logits: `(T, E)`. Raw scores, float32.
        probs: `(T, E)`. Scores after the score activation, over all experts.
        expert_indices: `(T, K)` int32. The chosen experts of each token, best
            first.
        expert_weights: `(T, K)`. The weights of their outputs, float32.
        expert_mask: `(T, K)` bool, or `None`. Which of the `K` choices exist,
            for routers that give each token a number of experts of its own.
            `None` means all of them.
    """

    logits: Any
    probs: Any
    expert_indices: Any
    expert_weights: Any
    expert_mask: Any = None


def assigned(routing, mask=None):
    """Which of the `K` choices of each token count, `(T, K)`; `None` for all.

    Args:
        routing: A `Routing`.
        mask: `(T,)` bool, or `None`. `False` tokens go nowhere.
    """
    if mask is None:
        return routing.expert_mask
    mask = ops.expand_dims(mask, -1)
    if routing.expert_mask is None:
        return ops.broadcast_to(mask, ops.shape(routing.expert_indices))
    return ops.logical_and(mask, routing.expert_mask)


def expert_counts(routing, num_experts, mask=None):
    """Number of tokens assigned to each expert, before any is dropped.

    Args:
        routing: A `Routing`.
        num_experts: int.
        mask: `(T,)` bool, or `None`. `False` tokens are not counted.

    Returns:
        `(E,)` float32. Carries no gradient.
    """
    counts = assigned(routing, mask)
    if counts is None:
        counts = ops.ones_like(routing.expert_indices)
    return ops.segment_sum(
        ops.reshape(ops.cast(counts, "float32"), (-1,)),
        ops.reshape(routing.expert_indices, (-1,)),
        num_segments=num_experts,
    )
