"""Sending tokens to their experts and bringing the results back.

Both directions are gathers along a permutation, and so are their gradients:
no scatter-add, hence no order of summation that changes from run to run. Only
where a router has far fewer choices than places for them (`max_rows`: expert
choice) the way back is a segment sum, since gathering would take `(T, E, D)`.
"""

import math

import keras
from keras import ops

from keras_moe import backend
from keras_moe.ops.dispatch_plan import by_choice
from keras_moe.ops.dispatch_plan import by_token
from keras_moe.ops.dispatch_plan import plan_dispatch
from keras_moe.ops.dispatch_plan import row_weights
from keras_moe.ops.dispatch_plan import with_positions
from keras_moe.ops.sizes import larger


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
    group_sizes, plan = plan_dispatch(
        routing,
        num_experts,
        mask,
        capacity,
        drop_policy,
        group_size,
        max_rows,
        seed,
    )
    if max_rows is None:
        plan = with_positions(plan, routing)
    return to_rows(tokens, plan), group_sizes, plan


def to_rows(tokens, plan):
    """A copy of its token for each row: `(T, ...)` -> `(N, ...)`."""
    return backend.with_gradient(
        _to_rows, _to_rows_gradient, (tokens,), (plan,)
    )


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
        d_weights = backend.segment_sum(
            _clear_unused_rows(d_row_weights, plan),
            plan.choices,
            num_tokens * top_k,
        )
        d_weights = by_token(d_weights, num_tokens, top_k)
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
        d_rows = _clear_unused_rows(d_rows, plan)
        return (_sum_by_token(d_rows, plan),)
    return (ops.sum(_at_positions(d_rows, plan), axis=1),)


def _sum_by_token(rows, plan):
    return backend.segment_sum(
        rows, _token_of_row(plan), ops.shape(plan.kept)[0]
    )


def _clear_unused_rows(rows, plan):
    kept = backend.take(by_choice(plan.kept), plan.choices)
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
    return ops.mod(plan.choices, larger(num_tokens, 1))
