"""Sending tokens to their experts, as a layer's capacity and router say."""

from typing import Any
from typing import NamedTuple

from keras import ops

from keras_moe.moe.tokens import check_width
from keras_moe.moe.tokens import match_rank
from keras_moe.ops.dispatch import combine
from keras_moe.ops.dispatch import to_rows
from keras_moe.ops.dispatch_plan import DispatchPlan
from keras_moe.ops.dispatch_plan import normalize_kept_weights
from keras_moe.ops.dispatch_plan import plan_dispatch
from keras_moe.ops.dispatch_plan import row_weights
from keras_moe.ops.dispatch_plan import with_positions
from keras_moe.ops.sizes import is_symbolic_size


class Sending(NamedTuple):
    """How the tokens of one call go to their experts.

    Fields:
        weights: `(T, K)`. Of the outputs, or the inputs, of the experts.
        plan: A `DispatchPlan` without positions.
        group_sizes: `(E,)` int32. Rows of each expert.
        max_group_size: An upper bound of them, static where sizes are.
        compact: bool. Whether there are fewer rows than choices.
        limited: bool. Whether choices may have been dropped.
    """

    weights: Any
    plan: DispatchPlan
    group_sizes: Any
    max_group_size: Any
    compact: bool
    limited: bool


def plan_sending(layer, routing, mask, training, num_sequences):
    num_tokens, top_k = ops.shape(routing.expert_indices)
    capacity = layer.capacity
    group_size = capacity.group_size(num_tokens, num_sequences)
    size = capacity.of(group_size, layer.num_experts, top_k, training)
    max_rows = None
    # Nothing says that so many rows are no more than a symbolic size.
    if hasattr(layer.router, "max_rows") and not is_symbolic_size(num_tokens):
        max_rows = layer.router.max_rows(num_tokens, num_sequences)
    draws = training and capacity.drop_policy == "random"
    group_sizes, plan = plan_dispatch(
        routing,
        layer.num_experts,
        mask,
        size,
        capacity.drop_policy,
        None if capacity.per == "batch" else group_size,
        max_rows,
        seed=layer.seed_generator if draws else None,
    )
    weights = routing.expert_weights
    if capacity.normalize_kept_weights:
        weights = normalize_kept_weights(plan, weights)
    max_group_size = num_tokens * top_k
    if getattr(layer.router, "distinct_choices", False):
        max_group_size = num_tokens
    if size is not None:
        known = isinstance(size, int) and isinstance(max_group_size, int)
        if known and group_size > 0:
            groups = -(-num_tokens // group_size)
            max_group_size = min(size * groups, max_group_size)
    return Sending(
        weights,
        plan,
        group_sizes,
        max_group_size,
        compact=max_rows is not None,
        limited=size is not None,
    )


def mix_tokens(layer, tokens, sending, training):
    """What the experts make of the tokens, without copying a row.

    Returns:
        `(T, ...)`, or `None` where rows have to be sent: the experts need them,
        or there are fewer of them than choices, or the backend has no kernel.
    """
    experts = layer.experts
    if (
        not hasattr(experts, "mix")
        or experts.compute_dtype != layer.compute_dtype
        or layer.weights_on == "input"
        or sending.compact
    ):
        return None
    return experts.mix(
        tokens,
        row_weights(sending.plan, sending.weights),
        sending.plan.choices,
        sending.group_sizes,
        training=training,
    )


def send_rows(layer, tokens, routing, sending, training):
    """Sends copies of the tokens to the experts, and back: `(T, ...)`."""
    weights, plan, group_sizes, max_group_size, *_ = sending
    if not sending.compact:
        plan = with_positions(plan, routing)
    rows = to_rows(tokens, plan)  # (N, ...)
    if layer.weights_on == "input":
        rows = rows * match_rank(row_weights(plan, weights), rows)
        exists = routing.expert_indices < layer.num_experts
        weights = ops.cast(exists, weights.dtype)
    rows = layer.exchange(rows, group_sizes, training, max_group_size)
    check_width(layer, rows, tokens.shape)
    return combine(rows, plan, weights)
