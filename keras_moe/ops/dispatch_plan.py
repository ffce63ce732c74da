"""The dispatch plan: which row holds which choice of which token."""

from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_moe import backend
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices
from keras_moe.ops.sizes import is_symbolic_size
from keras_moe.ops.sizes import larger

DROP_POLICIES = ("position", "token", "priority", "weight", "random")


class DispatchPlan(NamedTuple):
    """How rows and tokens correspond.

    Fields:
        choices: `(N,)` int32. The choice of each row: `k * T + t` for choice
            `k` of token `t`.
        positions: `(T, K)` int32. The row of each choice. `None` with
            `max_rows`, where some choices have no row.
        kept: `(T, K)` bool, `False` for choices that were masked or dropped or
            do not exist; their rows come after all others. `None` if nothing
            was masked or dropped.
    """

    choices: Any
    positions: Any = None
    kept: Any = None


def plan_dispatch(
    routing,
    num_experts,
    mask=None,
    capacity=None,
    drop_policy="position",
    group_size=None,
    max_rows=None,
    seed=None,
):
    """Decides which row is for which choice, without moving tokens.

    Args: As for `dispatch`.

    Returns:
        `(group_sizes, plan)`, the plan without `positions`.
    """
    if drop_policy not in DROP_POLICIES:
        raise ValueError(
            f"`drop_policy` must be one of {DROP_POLICIES}. "
            f"Received: drop_policy={drop_policy!r}"
        )
    num_tokens, top_k = ops.shape(routing.expert_indices)
    experts = by_choice(routing.expert_indices)  # (N,)
    kept = None
    if mask is not None:
        kept = ops.expand_dims(mask, -1)
        kept = ops.broadcast_to(kept, (num_tokens, top_k))
        experts = ops.where(by_choice(kept), experts, num_experts)
    if capacity is not None:
        order = _priority(routing, drop_policy, seed)
        keys = experts
        if group_size is not None:
            token = ops.tile(ops.arange(num_tokens, dtype="int32"), (top_k,))
            group = token // larger(group_size, 1)
            keys = experts + group * (num_experts + 1)
        rank = _rank_among_equals(keys, order)
        fits = ops.logical_and(rank < capacity, experts < num_experts)
        experts = ops.where(fits, experts, num_experts)
    choices = backend.stable_argsort(experts, num_experts + 1)
    if max_rows is not None:
        choices = choices[:max_rows]
    if mask is not None or capacity is not None or max_rows is not None:
        kept = by_token(experts < num_experts, num_tokens, top_k)
    return _count(experts, num_experts), DispatchPlan(choices, kept=kept)


def with_positions(plan, routing):
    """The plan with `positions`, the row of each choice."""
    num_choices = ops.shape(plan.choices)[0]
    positions = backend.stable_argsort(plan.choices, num_choices)
    return plan._replace(
        positions=by_token(positions, *ops.shape(routing.expert_indices))
    )


def row_weights(plan, expert_weights):
    """The weight of each row, zero for unused rows.

    Args:
        plan: The `DispatchPlan` of `dispatch`.
        expert_weights: `(T, K)`.

    Returns:
        `(N,)`.

    Example:

    The expert has room for one of two tokens.

    >>> routing = keras_moe.routers.Routing(
    ...     logits=keras.ops.zeros((2, 2)),
    ...     probs=keras.ops.ones((2, 2)) / 2,
    ...     expert_indices=keras.ops.array([[0], [0]], "int32"),
    ...     expert_weights=keras.ops.array([[0.5], [0.25]]),
    ... )
    >>> tokens = keras.ops.array([[1.0], [2.0]])
    >>> rows, sizes, plan = keras_moe.ops.dispatch(
    ...     tokens, routing, 2, capacity=1
    ... )
    >>> weights = keras_moe.ops.row_weights(plan, routing.expert_weights)
    >>> keras.ops.convert_to_numpy(weights).tolist()
    [0.5, 0.0]
    """
    if plan.kept is not None:
        expert_weights = ops.where(
            plan.kept, expert_weights, ops.zeros_like(expert_weights)
        )
    return backend.take(by_choice(expert_weights), plan.choices)


def normalize_kept_weights(plan, expert_weights):
    """Divides the weights of each token by the sum of its kept weights.

    Args:
        plan: The `DispatchPlan` of `dispatch`.
        expert_weights: `(T, K)`, not negative.

    Returns:
        `(T, K)`, zero for choices that were not kept.

    Example:

    The expert has room for one of two tokens.

    >>> routing = keras_moe.routers.Routing(
    ...     logits=keras.ops.zeros((2, 2)),
    ...     probs=keras.ops.ones((2, 2)) / 2,
    ...     expert_indices=keras.ops.array([[0], [0]], "int32"),
    ...     expert_weights=keras.ops.array([[0.5], [0.25]]),
    ... )
    >>> tokens = keras.ops.array([[1.0], [2.0]])
    >>> rows, sizes, plan = keras_moe.ops.dispatch(
    ...     tokens, routing, 2, capacity=1
    ... )
    >>> weights = keras_moe.ops.normalize_kept_weights(
    ...     plan, routing.expert_weights
    ... )
    >>> keras.ops.convert_to_numpy(weights)[:, 0].tolist()
    [1.0, 0.0]
    """
    if plan.kept is not None:
        expert_weights = ops.where(
            plan.kept, expert_weights, ops.zeros_like(expert_weights)
        )
    total = ops.sum(expert_weights, axis=-1, keepdims=True)
    total = ops.where(total != 0, total, ops.ones_like(total))
    return expert_weights / total


def by_choice(x):
    """`(T, K)` -> `(N,)`, all first choices first."""
    return ops.reshape(ops.transpose(x), (-1,))


def by_token(x, num_tokens, top_k):
    """The inverse of `by_choice`."""
    return ops.transpose(ops.reshape(x, (top_k, num_tokens)))


def _count(experts, num_experts):
    ones = ops.ones_like(experts)
    return backend.segment_sum(ones, experts, num_experts + 1)[:-1]


def _priority(routing, drop_policy, seed):
    """Indices that sort choices by priority, `(N,)`; `None` keeps the order."""
    num_tokens, top_k = ops.shape(routing.expert_indices)
    if drop_policy == "token":
        number = ops.arange(num_tokens * top_k, dtype="int32")
        return by_choice(ops.reshape(number, (top_k, num_tokens)))
    if drop_policy == "weight":
        weights = ops.stop_gradient(routing.expert_weights)
        return ops.argsort(-by_choice(weights))
    if drop_policy == "random" and seed is not None:
        draws = keras.random.uniform((num_tokens * top_k,), seed=seed)
        return ops.argsort(draws)
    if drop_policy == "priority":
        probs = ops.stop_gradient(routing.probs)
        # Not `ops.max`, which on torch gives a scalar if there are no tokens.
        largest = take_chosen(probs, top_k_indices(probs, 1))[:, 0]
        order = ops.argsort(-largest)  # (T,)
        first = ops.expand_dims(ops.arange(top_k) * num_tokens, -1)
        order = ops.expand_dims(order, 0) + ops.cast(first, order.dtype)
        return ops.reshape(order, (-1,))
    return None


def _rank_among_equals(keys, order):
    """Number of equal keys before each key in the given order, `(N,)`."""
    if order is not None:
        keys = backend.take(keys, order)
    num_choices = ops.shape(keys)[0]
    number = ops.arange(num_choices, dtype="int32")
    by_key = ops.argsort(keys)  # stable
    ordered = backend.take(keys, by_key)
    if is_symbolic_size(num_choices):  # which JAX's `searchsorted` refuses
        starts = _starts(ordered, number, num_choices)
    else:
        starts = ops.searchsorted(ordered, ordered, side="left")
    rank = number - ops.cast(starts, "int32")
    if order is not None:
        by_key = backend.take(order, by_key)
    return backend.take(rank, ops.argsort(by_key))


def _starts(ordered, number, size):
    """Index of the first entry that equals each entry."""
    before = ops.concatenate([ordered[:1] - 1, ordered])[:size]
    differs = ordered != before
    run = ops.cumsum(ops.cast(differs, "int32")) - 1
    first = ops.where(differs, number, 0)
    return backend.take(backend.segment_sum(first, run, size), run)
