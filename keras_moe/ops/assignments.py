"""What a balancing loss reads from a `Routing`: choices and scores."""

from keras import ops

from keras_moe.ops.groups import to_groups
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.scores import softmax
from keras_moe.ops.selection import top_k_indices

ASSIGNMENTS = ("all", "first", "logits")
SCORES = ("router", "softmax", "raw")


def assigned_experts(routing, assignments="all"):
    """The experts of each token that a loss counts.

    Args:
        routing: A `Routing`.
        assignments: `"all"` takes all choices of the router, `"first"` only
            the first one, `"logits"` the `K` largest logits, which ignores a
            selection bias. Defaults to `"all"`.

    Returns:
        `(T, K)` int32, `num_experts` for a choice that does not exist.
    """
    if assignments == "all":
        return routing.expert_indices
    if assignments == "first":
        return routing.expert_indices[:, :1]
    num_experts = routing.logits.shape[-1]
    top_k = min(routing.expert_indices.shape[-1], num_experts)
    return top_k_indices(ops.cast(routing.logits, "float32"), top_k)


def expert_scores(routing, scores="router", mask=None):
    """The scores of all experts that a loss uses.

    Args:
        routing: A `Routing`.
        scores: `"router"` takes `probs` divided by their sum, `"softmax"` the
            softmax of the logits, `"raw"` the `probs` unchanged. Defaults to
            `"router"`.
        mask: `(T,)` bool, or `None`. Values of `False` tokens are not read.
            Defaults to `None`.

    Returns:
        `(T, E)` float32, undefined for masked tokens.
    """
    if scores == "softmax":
        logits = zero_masked(ops.cast(routing.logits, "float32"), mask)
        return softmax(logits)
    probs = zero_masked(ops.cast(routing.probs, "float32"), mask)
    if scores == "raw":
        return probs
    total = ops.sum(probs, axis=-1, keepdims=True)
    # The gradient divides by the square, which must not underflow.
    return probs / ops.maximum(total, 1e-12)


def sums_by_expert(values, experts, num_experts, mask, groups):
    """Sums the values of each expert, in each group of tokens.

    Args:
        values: `(T, K)` float32.
        experts: `(T, K)` int32, the expert of each value, `num_experts` for a
            choice that does not exist.
        num_experts: int.
        mask: `(T,)` bool, or `None`. `False` tokens do not count.
        groups: `G`, an int or an integer tensor.

    Returns:
        `(G, E)` float32.
    """
    if mask is not None:
        experts = ops.where(ops.expand_dims(mask, -1), experts, num_experts)
    if isinstance(groups, int) and groups == 1:
        sums = ops.segment_sum(
            ops.reshape(zero_masked(values, mask), (-1,)),
            ops.reshape(experts, (-1,)),
            num_segments=num_experts + 1,
        )
        return ops.expand_dims(sums[:-1], 0)
    experts = to_groups(ops.cast(experts, "int32"), groups)  # (G, T / G, K)
    first = ops.cast(ops.arange(groups), "int32") * (num_experts + 1)
    segments = experts + ops.reshape(first, (-1, 1, 1))
    sums = ops.segment_sum(
        ops.reshape(zero_masked(values, mask), (-1,)),
        ops.reshape(segments, (-1,)),
        num_segments=groups * (num_experts + 1),
    )
    return ops.reshape(sums, (groups, num_experts + 1))[:, :-1]


def counts_by_expert(experts, num_experts, mask, groups):
    """Number of choices of each expert, in each group of tokens.

    Args:
        experts: `(T, K)` int32, `num_experts` for a choice that does not exist.
        num_experts: int.
        mask: `(T,)` bool, or `None`. `False` tokens do not count.
        groups: `G`, an int or an integer tensor.

    Returns:
        `(G, E)` float32. Carries no gradient.
    """
    ones = ops.ones_like(experts, dtype="float32")
    return sums_by_expert(ones, experts, num_experts, mask, groups)
