"""Sending tokens to their experts and bringing the results back.

Both directions are gathers along a permutation, and so are their gradients:
no scatter-add, hence no order of summation that changes from run to run.
"""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_moe import backend

DROP_POLICIES = ("position", "weight")


class DispatchPlan(NamedTuple):
    """How rows and tokens correspond.

    Fields:
        choices: `(N,)` int32. The choice that each row carries out, counted
            with the first choices of all tokens first: `k * T + t`.
        positions: `(T, K)` int32. The row of each choice.
        kept: `(T, K)` bool, or `None` if nothing was masked or dropped. The
            rows of other choices come after those of all experts.
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
):
    """Sorts copies of the tokens by expert.

    Args:
        tokens: `(T, D)`.
        routing: A `Routing`.
        num_experts: int.
        mask: `(T,)` bool, or `None`. `False` tokens take no expert's capacity.
        capacity: int or int32 scalar, or `None`. Rows an expert takes at most.
            `None` drops nothing.
        drop_policy: Who stays when an expert has more than `capacity` tokens.
            `"position"`: first choices before second choices and so on, among
            them earlier tokens first (GShard, Switch). `"weight"`: the largest
            expert weights, among equals as before.

    Returns:
        `(rows, group_sizes, plan)`: `rows` `(N, D)` with those of expert 0
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
        weights = None
        if drop_policy == "weight":
            weights = _by_choice(ops.stop_gradient(routing.expert_weights))
        rank = _rank_in_group(experts, num_experts, weights)
        fits = ops.logical_and(rank < capacity, experts < num_experts)
        experts = ops.where(fits, experts, num_experts)
        kept = ops.transpose(ops.reshape(fits, (top_k, num_tokens)))
    choices, row_of_choice = _sort(experts)
    positions = ops.transpose(ops.reshape(row_of_choice, (top_k, num_tokens)))
    plan = DispatchPlan(choices, positions, kept)
    group_sizes = _count(experts, num_experts)
    rows = backend.with_gradient(
        _to_rows, _to_rows_gradient, (tokens,), (plan,)
    )
    return rows, group_sizes, plan


def combine(rows, plan, expert_weights):
    """Brings the rows back to their tokens, weighted and summed in float32.

    Args:
        rows: `(N, D)`. What the experts made of the rows of `dispatch`.
        plan: The `DispatchPlan` of `dispatch`.
        expert_weights: `(T, K)` float32.

    Returns:
        `(T, D)`, in the dtype of `rows`. Tokens of which nothing was kept give
        zero.
    """
    return backend.with_gradient(
        _weighted_sum,
        _weighted_sum_gradients,
        (rows, expert_weights),
        (plan,),
    )


def _weighted_sum(rows, weights, plan):
    dtype = _sum_dtype(rows, weights)
    gathered = ops.cast(_at_positions(rows, plan), dtype)  # (T, K, D)
    weights = ops.cast(weights, dtype)
    return ops.cast(ops.einsum("tk,tkd->td", weights, gathered), rows.dtype)


def _weighted_sum_gradients(d_out, rows, weights, plan):
    # Gathered anew: (T, K, D) is too much to keep for the backward pass.
    dtype = _sum_dtype(rows, weights)
    gathered = ops.cast(_at_positions(rows, plan), dtype)
    d_out = ops.cast(d_out, dtype)
    d_weights = ops.einsum("td,tkd->tk", d_out, gathered)
    d_weights = ops.cast(d_weights, weights.dtype)
    weights = ops.cast(weights, dtype)
    if plan.kept is not None:
        weights = ops.where(plan.kept, weights, ops.zeros_like(weights))
    row_weights = ops.take(_by_choice(weights), plan.choices)
    d_rows = ops.take(d_out, _token_of_row(plan), axis=0)
    d_rows = ops.expand_dims(row_weights, -1) * d_rows
    return ops.cast(d_rows, rows.dtype), d_weights


def _sum_dtype(rows, weights):
    dtypes = map(keras.backend.standardize_dtype, (rows.dtype, weights.dtype))
    return "float64" if "float64" in dtypes else "float32"


def _to_rows(tokens, plan):
    return ops.take(tokens, _token_of_row(plan), axis=0)


def _to_rows_gradient(d_rows, tokens, plan):
    return (ops.sum(_at_positions(d_rows, plan), axis=1),)


def _at_positions(rows, plan):
    """`(N, D)` -> `(T, K, D)`, zero where a choice has not been kept."""
    # Flat, since JAX's `take` gets the shape wrong where there is no row.
    gathered = ops.take(rows, ops.reshape(plan.positions, (-1,)), axis=0)
    gathered = ops.reshape(
        gathered, (*ops.shape(plan.positions), rows.shape[-1])
    )
    if plan.kept is None:
        return gathered
    kept = ops.expand_dims(plan.kept, -1)
    return ops.where(kept, gathered, ops.zeros_like(gathered))


def _token_of_row(plan):
    num_tokens = ops.shape(plan.positions)[0]
    return ops.mod(plan.choices, ops.maximum(num_tokens, 1))


def _by_choice(x):
    """`(T, K)` -> `(N,)`, all first choices first."""
    return ops.reshape(ops.transpose(x), (-1,))


def _sort(experts):
    """The stable order by expert, and its inverse."""
    order = ops.argsort(experts)
    return order, ops.argsort(order)


def _count(experts, num_experts):
    ones = ops.ones_like(experts)
    return ops.segment_sum(ones, experts, num_segments=num_experts + 1)[:-1]


def _rank_in_group(experts, num_experts, weights=None):
    """How many of the same expert's choices come before each choice, `(N,)`."""
    order, position = _sort(experts)
    if weights is not None:
        by_weight = ops.argsort(-weights)
        order = ops.argsort(ops.take(experts, by_weight))
        position = ops.argsort(ops.take(by_weight, order))
    ends = ops.cumsum(_count(experts, num_experts))
    starts = ops.concatenate([ops.zeros((1,), ends.dtype), ends])
    return position - ops.take(starts, experts)
