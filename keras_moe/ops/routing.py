"""What routers return."""

from typing import Any
from typing import NamedTuple

from keras import ops


class Routing(NamedTuple):
    """What a router decided: which experts each token goes to, and how much.

    A router that gives each token a number of experts of its own says so with
    choices that do not exist: they have the index `num_experts` and the weight
    0.

    Fields:
        logits: `(T, E)`. Raw scores, float32.
        probs: `(T, E)`. Scores after the score activation, over all experts.
        expert_indices: `(T, K)` int32. The chosen experts of each token, best
            first.
        expert_weights: `(T, K)`. The weights of their outputs, float32.
    """

    logits: Any
    probs: Any
    expert_indices: Any
    expert_weights: Any


def expert_counts(routing, num_experts, mask=None):
    """Number of tokens assigned to each expert, before any is dropped.

    Args:
        routing: A `Routing`.
        num_experts: int.
        mask: `(T,)` bool, or `None`. `False` tokens are not counted.

    Returns:
        `(E,)` float32. Carries no gradient.
    """
    experts = routing.expert_indices
    if mask is not None:
        experts = ops.where(ops.expand_dims(mask, -1), experts, num_experts)
    experts = ops.reshape(experts, (-1,))
    ones = ops.ones_like(experts, dtype="float32")
    return ops.segment_sum(ones, experts, num_segments=num_experts + 1)[:-1]
