"""Sending tokens to their experts and bringing the results back.

Both directions are gathers along a permutation, and so are their gradients:
no scatter-add, hence no order of summation that changes from run to run. Only
where a router has far fewer choices than places for them (`max_rows`: expert
choice) the way back is a segment sum, since gathering would take `(T, E, D)`.
"""

import math
from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_moe import backend

DROP_POLICIES = ("position", "token", "priority", "weight", "random")


class DispatchPlan(NamedTuple):
    """How rows and tokens correspond.

    Fields:
        choices: `(N,)` int32. The choice that each row carries out, counted
            with the first choices of all tokens first: `k * T + t`.
        positions: `(T, K)` int32. The row of each choice; `None` with
            `max_rows`, where not every choice has one.
        kept: `(T, K)` bool, or `None` if every choice exists and nothing was
            masked or dropped. The rows of other choices come after those of
            all experts.
    """

    choices: Any
    positions: Any
    kept: Any = None


def dispatch(
    tokens,
    routing,
    num_experts,
    mask=None,
    capacity=None,
    drop_policy="position",
    group_size=None,
    max_rows=None,
    seed=None,
):
    """Sorts copies of the tokens by expert.

    Args:
        tokens: `(T, ...)`.
        routing: A `Routing`.
        num_experts: int.
        mask: `(T,)` bool, or `None`. `False` tokens take no expert's capacity.
        capacity: int or int32 scalar, or `None`. Rows an expert takes at most
            of each group. `None` drops nothing.
        drop_policy: Who stays when an expert has more than `capacity` tokens,
            as in `keras_moe.layers.Capacity`. Defaults to `"position"`.
        group_size: int or int32 scalar, or `None`. Every so many tokens are a
            group, the last of which may be smaller. `None` makes the batch one.
            Defaults to `None`.
        max_rows: int or int32 scalar, or `None`. Makes `N` as small as that;
            for routings which have no more choices that exist. `None` is
            `T * K`. Defaults to `None`.
        seed: `keras.random.SeedGenerator` for the policy `"random"`. `None`
            makes it `"position"`. Defaults to `None`.

    Returns:
        `(rows, group_sizes, plan)`: `rows` `(N, ...)` with those of expert 0
        first, `group_sizes` `(E,)` int32 and a `DispatchPlan`.
    """
    if drop_policy not in DROP_POLICIES:
        raise ValueError(
            f"`drop_policy` must be one of {DROP_POLICIES}. "
            f"Received: drop_policy={drop_policy!r}"
        )
    num_tokens, top_k = ops.shape(routing.expert_indices)
    experts = _by_choice(routing.expert_indices)  # (N,)
    kept = None
    if mask is not None:
        kept = ops.expand_dims(mask, -1)
        kept = ops.broadcast_to(kept, (num_tokens, top_k))
        experts = ops.where(_by_choice(kept), experts, num_experts)
    if capacity is not None:
        order = _priority(routing, drop_policy, seed)
        keys = experts
        if group_size is not None:
            token = ops.tile(ops.arange(num_tokens, dtype="int32"), (top_k,))
            group = token // ops.maximum(group_size, 1)
            keys = experts + group * (num_experts + 1)
        rank = _rank_among_equals(keys, order)
        fits = ops.logical_and(rank < capacity, experts < num_experts)
        experts = ops.where(fits, experts, num_experts)
    choices = ops.argsort(experts)  # stable
    group_sizes = _count(experts, num_experts)
    if max_rows is not None:
        choices, positions = choices[:max_rows], None
    else:
        positions = _by_token(ops.argsort(choices), num_tokens, top_k)
    if mask is not None or capacity is not None or max_rows is not None:
        kept = _by_token(experts < num_experts, num_tokens, top_k)
    plan = DispatchPlan(choices, positions, kept)
    rows = backend.with_gradient(
        _to_rows, _to_rows_gradient, (tokens,), (plan,)
    )
    return rows, group_sizes, plan


def combine(rows, plan, expert_weights):
    """Brings the rows back to their tokens, weighted and summed in float32.

    Args:
        rows: `(N, ...)`. What the experts made of the rows of `dispatch`.
        plan: The `DispatchPlan` of `dispatch`.
        expert_weights: `(T, K)` float32.

    Returns:
        `(T, ...)`, in the dtype of `rows`. Tokens of which nothing was kept
        give zero.
    """
    num_rows, *shape = ops.shape(rows)
    outputs = backend.with_gradient(
        _weighted_sum,
        _weighted_sum_gradients,
        (ops.reshape(rows, (num_rows, math.prod(shape))), expert_weights),
        (plan,),
    )
    return ops.reshape(outputs, (ops.shape(expert_weights)[0], *shape))


def row_weights(plan, expert_weights):
    """The weight of each row, zero for rows of nobody.

    Args:
        plan: The `DispatchPlan` of `dispatch`.
        expert_weights: `(T, K)`.

    Returns:
        `(N,)`.
    """
    if plan.kept is not None:
        expert_weights = ops.where(
            plan.kept, expert_weights, ops.zeros_like(expert_weights)
        )
    return ops.take(_by_choice(expert_weights), plan.choices)


def normalize_kept_weights(plan, expert_weights):
    """The weights, divided by the sum of those of each token that were kept.

    Args:
        plan: The `DispatchPlan` of `dispatch`.
        expert_weights: `(T, K)`, not negative.

    Returns:
        `(T, K)`, zero for what was not kept.
    """
    if plan.kept is not None:
        expert_weights = ops.where(
            plan.kept, expert_weights, ops.zeros_like(expert_weights)
        )
    total = ops.sum(expert_weights, axis=-1, keepdims=True)
    total = ops.where(total != 0, total, ops.ones_like(total))
    return expert_weights / total


def _weighted_sum(rows, weights, plan):
    dtype = _sum_dtype(rows, weights)
    weights = ops.cast(weights, dtype)
    if plan.positions is None:
        per_row = ops.expand_dims(row_weights(plan, weights), -1)
        out = _sum_by_token(per_row * ops.cast(rows, dtype), plan)
        return ops.cast(out, rows.dtype)
    gathered = ops.cast(_at_positions(rows, plan), dtype)  # (T, K, D)
    return ops.cast(ops.einsum("tk,tkd->td", weights, gathered), rows.dtype)


def _weighted_sum_gradients(d_out, rows, weights, plan):
    dtype = _sum_dtype(rows, weights)
    d_out = ops.cast(d_out, dtype)
    d_out_of_row = ops.take(d_out, _token_of_row(plan), axis=0)  # (N, D)
    if plan.positions is None:
        d_row_weights = ops.sum(ops.cast(rows, dtype) * d_out_of_row, axis=-1)
        num_tokens, top_k = ops.shape(weights)
        d_weights = ops.segment_sum(
            _zero_rows_of_nobody(d_row_weights, plan),
            plan.choices,
            num_segments=num_tokens * top_k,
        )
        d_weights = _by_token(d_weights, num_tokens, top_k)
    else:
        # Gathered anew: (T, K, D) is too much to keep for the backward pass.
        gathered = ops.cast(_at_positions(rows, plan), dtype)
        d_weights = ops.einsum("td,tkd->tk", d_out, gathered)
    d_weights = ops.cast(d_weights, weights.dtype)
    per_row = row_weights(plan, ops.cast(weights, dtype))
    d_rows = ops.expand_dims(per_row, -1) * d_out_of_row
    return ops.cast(d_rows, rows.dtype), d_weights


def _sum_dtype(rows, weights):
    dtypes = map(keras.backend.standardize_dtype, (rows.dtype, weights.dtype))
    return "float64" if "float64" in dtypes else "float32"


def _to_rows(tokens, plan):
    return ops.take(tokens, _token_of_row(plan), axis=0)


def _to_rows_gradient(d_rows, tokens, plan):
    if plan.positions is None:
        d_rows = _zero_rows_of_nobody(d_rows, plan)
        return (_sum_by_token(d_rows, plan),)
    return (ops.sum(_at_positions(d_rows, plan), axis=1),)


def _sum_by_token(rows, plan):
    return ops.segment_sum(
        rows, _token_of_row(plan), num_segments=ops.shape(plan.kept)[0]
    )


def _zero_rows_of_nobody(rows, plan):
    kept = ops.take(_by_choice(plan.kept), plan.choices)
    kept = ops.reshape(kept, (-1,) + (1,) * (len(rows.shape) - 1))
    return ops.where(kept, rows, ops.zeros_like(rows))


def _at_positions(rows, plan):
    """`(N, ...)` -> `(T, K, ...)`, zero where a choice has not been kept."""
    # Flat, since JAX's `take` gets the shape wrong where there is no row.
    gathered = ops.take(rows, ops.reshape(plan.positions, (-1,)), axis=0)
    gathered = ops.reshape(
        gathered, (*ops.shape(plan.positions), *ops.shape(rows)[1:])
    )
    if plan.kept is None:
        return gathered
    kept = ops.reshape(
        plan.kept, (*ops.shape(plan.kept),) + (1,) * (len(rows.shape) - 1)
    )
    return ops.where(kept, gathered, ops.zeros_like(gathered))


def _token_of_row(plan):
    layout = plan.kept if plan.positions is None else plan.positions
    num_tokens = ops.shape(layout)[0]
    return ops.mod(plan.choices, ops.maximum(num_tokens, 1))


def _by_choice(x):
    """`(T, K)` -> `(N,)`, all first choices first."""
    return ops.reshape(ops.transpose(x), (-1,))


def _by_token(x, num_tokens, top_k):
    """The inverse of `_by_choice`."""
    return ops.transpose(ops.reshape(x, (top_k, num_tokens)))


def _count(experts, num_experts):
    ones = ops.ones_like(experts)
    return ops.segment_sum(ones, experts, num_segments=num_experts + 1)[:-1]


def _priority(routing, drop_policy, seed):
    """The order in which choices are asked, `(N,)`; `None` for as they are."""
    num_tokens, top_k = ops.shape(routing.expert_indices)
    if drop_policy == "token":
        number = ops.arange(num_tokens * top_k, dtype="int32")
        return _by_choice(ops.reshape(number, (top_k, num_tokens)))
    if drop_policy == "weight":
        weights = ops.stop_gradient(routing.expert_weights)
        return ops.argsort(-_by_choice(weights))
    if drop_policy == "random" and seed is not None:
        draws = keras.random.uniform((num_tokens * top_k,), seed=seed)
        return ops.argsort(draws)
    if drop_policy == "priority":
        probs = ops.stop_gradient(routing.probs)
        largest = ops.max(probs, axis=-1, initial=0.0)
        order = ops.argsort(-largest)  # (T,)
        first = ops.expand_dims(ops.arange(top_k) * num_tokens, -1)
        order = ops.expand_dims(order, 0) + ops.cast(first, order.dtype)
        return ops.reshape(order, (-1,))
    return None


def _rank_among_equals(keys, order):
    """How many equal keys come before each in the given order, `(N,)`."""
    if order is not None:
        keys = ops.take(keys, order)
    num_choices = ops.shape(keys)[0]
    number = ops.arange(num_choices, dtype="int32")
    if not isinstance(num_choices, int) and not ops.is_tensor(num_choices):
        # Keras infers shapes on JAX with symbolic sizes, which `searchsorted`
        # does not take. Only the shape counts then.
        return number
    by_key = ops.argsort(keys)  # stable
    ordered = ops.take(keys, by_key)
    starts = ops.searchsorted(ordered, ordered, side="left")
    rank = number - ops.cast(starts, "int32")
    if order is not None:
        by_key = ops.take(order, by_key)
    return ops.take(rank, ops.argsort(by_key))
