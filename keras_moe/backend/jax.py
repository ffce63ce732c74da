"""JAX kernels.

`row_blocks` cuts the rows of each group into full blocks of a large static
size and a tail of small ones, and runs one product per block in a loop whose
trip count is data: nothing is computed for experts without rows. JAX has no
reverse-mode gradient for such a loop, hence the `custom_vjp`, whose backward
pass is two loops of the same kind.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_moe.backend import reference


def top_k_indices(scores, k):
    return lax.top_k(scores, k)[1]


def with_gradient(forward, backward, inputs, constants):
    # Everything is an argument: rematerialization forbids closing over traced
    # arrays.
    @jax.custom_vjp
    def call(inputs, constants):
        return forward(*inputs, *constants)

    def call_forward(inputs, constants):
        return forward(*inputs, *constants), (inputs, constants)

    def call_backward(residuals, grad):
        inputs, constants = residuals
        return backward(grad, *inputs, *constants), None

    call.defvjp(call_forward, call_backward)
    return call(inputs, constants)


def is_symbolic(tensor):
    return isinstance(tensor, jax.core.Tracer)


def all_reduce_sum(tensor):
    return tensor  # one program sees the batch of all devices


def slice_bounds(group_sizes):
    return None  # whatever is not compiled now will be somewhere else


def block_sizes(num_rows, num_groups):
    """Rows of a full block and of a tail block, for the average group."""
    average = max(num_rows // num_groups, 1)
    full = min(max(2 ** (average.bit_length() - 1), 16), 256, num_rows)
    return full, min(max(full // 4, 8), num_rows)


def _loops(group_sizes, num_rows):
    """Yields `(block_size, is_tail, num_blocks, locate)` for the two loops.

    `locate(i)` gives the group of block `i` and its first and last row + 1.
    """
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    full, tail = block_sizes(num_rows, group_sizes.shape[0])
    num_full = group_sizes // full
    tail_starts = starts + num_full * full
    num_tail = -((tail_starts - ends) // tail)

    def locate(size, first_rows, num_blocks, i):
        last_blocks = jnp.cumsum(num_blocks)
        group = jnp.searchsorted(last_blocks, i, side="right")
        in_group = i - (last_blocks - num_blocks)[group]
        return group, first_rows[group] + in_group * size, ends[group]

    for size, is_tail, first_rows, num_blocks in (
        (full, False, starts, num_full),
        (tail, True, tail_starts, num_tail),
    ):
        find = functools.partial(locate, size, first_rows, num_blocks)
        yield size, is_tail, jnp.sum(num_blocks), find


def _accumulation_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _slice_rows(x, start, size):
    return lax.dynamic_slice_in_dim(x, start, size, axis=0)


def _matmul_rows(lhs, rhs, group_sizes, transpose_rhs=False):
    """`out[i] = lhs[i] @ rhs[group of i]`, zero for rows of no group."""
    num_rows = lhs.shape[0]
    width = rhs.shape[1] if transpose_rhs else rhs.shape[2]
    contract = (
        (((1,), (1,)), ((), ()))
        if transpose_rhs
        else (
            ((1,), (0,)),
            ((), ()),
        )
    )
    out = jnp.zeros((num_rows, width), lhs.dtype)

    def body(i, out, size, is_tail, locate):
        group, start, stop = locate(i)
        # A tail block may reach beyond the last row: move it up and leave the
        # rows that are not its own as they are.
        first = jnp.minimum(start, num_rows - size)
        product = lax.dot_general(
            _slice_rows(lhs, first, size),
            lax.dynamic_index_in_dim(rhs, group, keepdims=False),
            contract,
            preferred_element_type=_accumulation_dtype(lhs.dtype),
        ).astype(out.dtype)
        if is_tail:
            row = first + jnp.arange(size)
            own = ((row >= start) & (row < stop))[:, None]
            product = jnp.where(own, product, _slice_rows(out, first, size))
        return lax.dynamic_update_slice_in_dim(out, product, first, axis=0)

    for size, is_tail, num_blocks, locate in _loops(group_sizes, num_rows):
        step = functools.partial(
            body, size=size, is_tail=is_tail, locate=locate
        )
        out = lax.fori_loop(0, num_blocks, step, out)
    return out


def _matmul_groups(lhs, grad, group_sizes):
    """`out[g] = lhs[rows of g].T @ grad[rows of g]`, the gradient of `rhs`."""
    num_rows = lhs.shape[0]
    dtype = _accumulation_dtype(lhs.dtype)
    shape = (group_sizes.shape[0], lhs.shape[1], grad.shape[1])
    out = jnp.zeros(shape, dtype)

    def body(i, out, size, is_tail, locate):
        group, start, stop = locate(i)
        first = jnp.minimum(start, num_rows - size)
        x = _slice_rows(lhs, first, size)
        g = _slice_rows(grad, first, size)
        if is_tail:
            row = first + jnp.arange(size)
            own = ((row >= start) & (row < stop))[:, None]
            # Both, since zero times a NaN of another group is NaN.
            x, g = jnp.where(own, x, 0), jnp.where(own, g, 0)
        product = lax.dot_general(
            x, g, (((0,), (0,)), ((), ())), preferred_element_type=dtype
        )
        total = lax.dynamic_index_in_dim(out, group, keepdims=False) + product
        return lax.dynamic_update_index_in_dim(out, total, group, axis=0)

    for size, is_tail, num_blocks, locate in _loops(group_sizes, num_rows):
        step = functools.partial(
            body, size=size, is_tail=is_tail, locate=locate
        )
        out = lax.fori_loop(0, num_blocks, step, out)
    return out


@jax.custom_vjp
def _row_blocks(lhs, rhs, group_sizes):
    return _matmul_rows(lhs, rhs, group_sizes)


def _row_blocks_forward(lhs, rhs, group_sizes):
    return _matmul_rows(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _row_blocks_backward(residuals, grad):
    lhs, rhs, group_sizes = residuals
    d_lhs = _matmul_rows(grad, rhs, group_sizes, transpose_rhs=True)
    d_rhs = _matmul_groups(lhs, grad, group_sizes).astype(rhs.dtype)
    return d_lhs, d_rhs, None


_row_blocks.defvjp(_row_blocks_forward, _row_blocks_backward)
# Outside of a jit the loops would otherwise be traced anew at each call.
_row_blocks_compiled = jax.jit(_row_blocks)


def row_blocks(lhs, rhs, group_sizes):
    if not isinstance(lhs.shape[0], int):
        # Keras infers shapes with symbolic sizes; only the shape counts then.
        return reference.grouped_matmul(lhs, rhs, group_sizes)
    if lhs.shape[0] == 0:  # no block of at least one row exists
        return jnp.zeros((0, rhs.shape[2]), lhs.dtype)
    return _row_blocks_compiled(lhs, rhs, group_sizes)


GROUPED_MATMUL = {"row_blocks": row_blocks}
