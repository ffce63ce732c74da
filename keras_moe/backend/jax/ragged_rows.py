"""Rows to the devices that own their experts, and back, without padding.

Here `tables` are, for each other device of the axis: the rows sent to it, the
rows that arrive from it, and where the latter stand among its own rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Delivering and collecting are each other's transposes.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def deliver(rows, tables, first, size, axis):
    """The next `size` rows of each owner, from `first` on.

    Args:
        rows: `(N, D)`, the rows of the first owner first.
        tables: As above.
        first: int32 scalar.
        size: int.
        axis: Name of the mesh axis.

    Returns:
        `(owners * size, D)`, by source; zeros for unused rows.
    """
    sent, arriving, _ = tables
    starts = jnp.cumsum(sent) - sent + first
    own = jnp.broadcast_to(lax.axis_index(axis) * size, sent.shape)
    room = jnp.zeros((sent.shape[0] * size, *rows.shape[1:]), rows.dtype)
    return _exchange(
        rows, room, starts, own, sent - first, arriving - first, size, axis
    )


def _deliver_forward(rows, tables, first, size, axis):
    residuals = (tables, first, jnp.zeros((rows.shape[0], 0)))
    return deliver(rows, tables, first, size, axis), residuals


def _deliver_backward(size, axis, residuals, grad):
    tables, first, like_rows = residuals
    num_rows = like_rows.shape[0]
    return collect(grad, tables, first, num_rows, axis), None, None


deliver.defvjp(_deliver_forward, _deliver_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def collect(results, tables, first, num_rows, axis):
    """The results of the delivered rows, back where the rows were.

    Args:
        results: `(owners * size, F)`, by source.
        tables, first, axis: As for `deliver`.
        num_rows: int. `N`.

    Returns:
        `(N, F)`, zeros for rows that were not delivered.
    """
    sent, arriving, theirs = tables
    owners = sent.shape[0]
    size = results.shape[0] // owners
    room = jnp.zeros((num_rows, *results.shape[1:]), results.dtype)
    starts = jnp.arange(owners, dtype="int32") * size
    return _exchange(
        *(results, room, starts, theirs + first),
        *(arriving - first, sent - first, size, axis),
    )


def _collect_forward(results, tables, first, num_rows, axis):
    residuals = (tables, first, jnp.zeros((results.shape[0], 0)))
    return collect(results, tables, first, num_rows, axis), residuals


def _collect_backward(num_rows, axis, residuals, grad):
    tables, first, like_results = residuals
    size = like_results.shape[0] // tables[0].shape[0]
    return deliver(grad, tables, first, size, axis), None, None


collect.defvjp(_collect_forward, _collect_backward)


def _exchange(rows, room, starts, targets, leave, arrive, size, axis):
    leave, arrive = jnp.clip(leave, 0, size), jnp.clip(arrive, 0, size)
    return lax.ragged_all_to_all(
        *(rows, room),
        # Nothing is read or written there, but it must be inside.
        jnp.where(leave > 0, starts, 0).astype("int32"),
        leave.astype("int32"),
        jnp.where(leave > 0, targets, 0).astype("int32"),
        arrive.astype("int32"),
        axis_name=axis,
    )
