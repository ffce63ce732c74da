"""Sending tokens to their experts and bringing the results back.

Both directions are gathers along a permutation, and so are their gradients:
without a scatter-add, the order of summation is the same in every run. Expert
choice has few rows for many possible choices (`max_rows`). There `combine` is a
segment sum, since a gather would need `(T, E, D)`.
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
    """Copies each token once per choice, and sorts the copies by expert.

    Args:
        tokens: `(T, ...)`.
        routing: A `Routing`.
        num_experts: int.
        mask: `(T,)` bool, or `None`. `False` tokens go to no expert and take
            no capacity. Defaults to `None`.
        capacity: int or int32 scalar, or `None`. The largest number of rows
            that an expert takes from each group. `None` drops nothing.
            Defaults to `None`.
        drop_policy: Which tokens an expert keeps if it has more than
            `capacity`, as in `keras_moe.layers.Capacity`. Defaults to
            `"position"`.
        group_size: int or int32 scalar, or `None`. Number of consecutive
            tokens in a group; the last group may be smaller. `None` makes the
            batch one group. Defaults to `None`.
        max_rows: int or int32 scalar, or `None`. The number of rows `N`, for a
            routing with at most so many choices that exist. `None` means
            `T * K`. Defaults to `None`.
        seed: `keras.random.SeedGenerator` for the policy `"random"`, which
            without one is `"position"`. Defaults to `None`.

    Returns:
        `(rows, group_sizes, plan)`: `(N, ...)`, the rows of expert 0 first,
        `(E,)` int32, the rows of each expert, and a `DispatchPlan`. Unused
        rows come last.

    Raises:
        ValueError: If `drop_policy` is not known.

    Example:

    >>> routing = keras_moe.routers.Routing(
    ...     logits=keras.ops.zeros((2, 2)),
    ...     probs=keras.ops.ones((2, 2)) / 2,
    ...     expert_indices=keras.ops.array([[1, 0], [0, 1]], "int32"),
    ...     expert_weights=keras.ops.array([[0.75, 0.25], [0.5, 0.5]]),
    ... )
    >>> tokens = keras.ops.array([[1.0], [2.0]])
    >>> rows, sizes, plan = keras_moe.ops.dispatch(tokens, routing, 2)
    >>> keras.ops.convert_to_numpy(rows)[:, 0].tolist()
    [2.0, 1.0, 1.0, 2.0]
    >>> keras.ops.convert_to_numpy(sizes).tolist()
    [2, 2]
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
    """The token of each row: `(T, ...)` -> `(N, ...)`."""
    return backend.with_gradient(
        _to_rows, _to_rows_gradient, (tokens,), (plan,)
    )


def combine(rows, plan, expert_weights):
    """Sums the weighted rows of each token, in float32.

    Args:
        rows: `(N, ...)`. The experts' outputs for the rows of `dispatch`.
        plan: The `DispatchPlan` of `dispatch`.
        expert_weights: `(T, K)` float32.

    Returns:
        `(T, ...)`, in the dtype of `rows`. Tokens without a kept choice give
        zero.

    Example:

    >>> routing = keras_moe.routers.Routing(
    ...     logits=keras.ops.zeros((2, 2)),
    ...     probs=keras.ops.ones((2, 2)) / 2,
    ...     expert_indices=keras.ops.array([[1, 0], [0, 1]], "int32"),
    ...     expert_weights=keras.ops.array([[0.75, 0.25], [0.5, 0.5]]),
    ... )
    >>> tokens = keras.ops.array([[1.0], [2.0]])
    >>> rows, sizes, plan = keras_moe.ops.dispatch(tokens, routing, 2)
    >>> out = keras_moe.ops.combine(10 * rows, plan, routing.expert_weights)
    >>> keras.ops.convert_to_numpy(out)[:, 0].tolist()
    [10.0, 20.0]
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
        # Gathered again: (T, K, D) is too large to keep for the backward pass.
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
    """`(N, ...)` -> `(T, K, ...)`, zero where a choice was dropped."""
    # Flat, since JAX's `take` returns a wrong shape if there are no rows.
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
