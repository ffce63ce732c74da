"""What routers return."""

from typing import Any
from typing import NamedTuple

from keras import ops


class Routing(NamedTuple):
    """The experts of each token and their weights.

    A token may have fewer than `K` experts. Its missing choices have the index
    `num_experts` and the weight 0.

    Fields:
        logits: `(T, E)`. Raw scores, float32.
        probs: `(T, E)`. Scores after the score activation, over all experts.
        expert_indices: `(T, K)` int32. The chosen experts of each token, best
            first.
        expert_weights: `(T, K)`. The weight of each chosen expert, float32.
    """

    logits: Any
    probs: Any
    expert_indices: Any
    expert_weights: Any


def expert_counts(routing, num_experts, mask=None):
    """Number of tokens that chose each expert, before dropping.

    Args:
        routing: A `Routing`.
        num_experts: int.
        mask: `(T,)` bool, or `None`. `False` tokens are not counted.
            Defaults to `None`.

    Returns:
        `(E,)` float32, without a gradient.

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=2, top_k=2)
    >>> routing = router(keras.ops.ones((3, 4)))
    >>> counts = keras_moe.ops.expert_counts(routing, 2)
    >>> keras.ops.convert_to_numpy(counts).tolist()
    [3.0, 3.0]
    """
    experts = routing.expert_indices
    if mask is not None:
        experts = ops.where(ops.expand_dims(mask, -1), experts, num_experts)
    experts = ops.reshape(experts, (-1,))
    ones = ops.ones_like(experts, dtype="float32")
    return ops.segment_sum(ones, experts, num_segments=num_experts + 1)[:-1]
