"""Grouped matmuls.

`row_blocks` runs one product per block of rows in a loop whose trip count is
data: nothing is computed for groups without rows. JAX has no reverse-mode
gradient for such a loop, hence the `custom_vjp`, whose backward pass is made of
loops of the same kind.

`ragged_dot` is JAX's own. On some devices it is one dense product with all
groups, masked; there it is only run if asked for by name.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_moe.backend.jax import blocks


def _matmul_rows(lhs, rhs, group_sizes, rhs_axis=1):
    """`out[i] = lhs[i] @ rhs[group of i]`, zero for rows of no group."""
    num_rows = lhs.shape[0]
    out = jnp.zeros((num_rows, rhs.shape[3 - rhs_axis]), lhs.dtype)
    for size, num_blocks, locate in blocks.loops(group_sizes, num_rows):

        def body(i, out, size=size, locate=locate):
            group, first, own = locate(i)
            product = blocks.matmul(
                blocks.read_rows(lhs, first, size),
                blocks.of_group(rhs, group),
                rhs_axis=rhs_axis - 1,
            )
            return blocks.write_rows(out, product.astype(out.dtype), first, own)

        out = lax.fori_loop(0, num_blocks, body, out)
    return out


def _matmul_groups(lhs, grad, group_sizes):
    """`out[g] = lhs[rows of g].T @ grad[rows of g]`, the gradient of `rhs`."""
    num_rows = lhs.shape[0]
    dtype = blocks.accumulation_dtype(lhs.dtype)
    shape = (group_sizes.shape[0], lhs.shape[1], grad.shape[1])
    out = jnp.zeros(shape, dtype)
    for size, num_blocks, locate in blocks.loops(group_sizes, num_rows):

        def body(i, out, size=size, locate=locate):
            group, first, own = locate(i)
            x, g = (
                blocks.keep_own(blocks.read_rows(a, first, size), own)
                for a in (lhs, grad)
            )
            return blocks.add_to_group(
                out, blocks.matmul(x, g, lhs_axis=0), group
            )

        out = lax.fori_loop(0, num_blocks, body, out)
    return out


@jax.custom_vjp
def _row_blocks(lhs, rhs, group_sizes):
    return _matmul_rows(lhs, rhs, group_sizes)


def _row_blocks_forward(lhs, rhs, group_sizes):
    return _matmul_rows(lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _row_blocks_backward(residuals, grad):
    lhs, rhs, group_sizes = residuals
    d_lhs = _matmul_rows(grad, rhs, group_sizes, rhs_axis=2)
    d_rhs = _matmul_groups(lhs, grad, group_sizes).astype(rhs.dtype)
    return d_lhs, d_rhs, None


_row_blocks.defvjp(_row_blocks_forward, _row_blocks_backward)
# Outside of a jit the loops would otherwise be traced anew at each call.
_row_blocks_compiled = jax.jit(_row_blocks)


def row_blocks(lhs, rhs, group_sizes):
    num_rows = lhs.shape[0]
    if not isinstance(num_rows, int):  # to be exported
        out = _row_blocks(blocks.pad(lhs), rhs, group_sizes)
        return out[:num_rows]
    if num_rows == 0:  # no block of at least one row exists
        return jnp.zeros((0, rhs.shape[2]), lhs.dtype)
    return _row_blocks_compiled(lhs, rhs, group_sizes)


@jax.jit
def _ragged_dot(lhs, rhs, group_sizes):
    # Rows of no group may be anything to `lax.ragged_dot`: they are zeroed
    # before and after, which does the same to both gradients.
    row = jnp.arange(lhs.shape[0], dtype=group_sizes.dtype)
    own = row < jnp.sum(group_sizes)
    out = lax.ragged_dot(
        blocks.keep_own(lhs, own),
        rhs,
        group_sizes,
        preferred_element_type=blocks.accumulation_dtype(lhs.dtype),
    )
    return blocks.keep_own(out.astype(lhs.dtype), own)


def ragged_dot(lhs, rhs, group_sizes):
    if not isinstance(lhs.shape[0], int):
        raise NotImplementedError("`ragged_dot` needs a static number of rows.")
    return _ragged_dot(lhs, rhs, group_sizes)


@functools.cache
def ragged_dot_is_sparse(platform):
    """Whether the device computes one product a row, not one with each group.

    Asked of the compiler, since it depends on the device and the version. Where
    it does not say, the answer is no.
    """
    num_groups, num_rows, dim, width = 8, 64, 128, 128
    shapes = ((num_rows, dim), (num_groups, dim, width))
    device = jax.local_devices(backend=platform)[0]
    on_device = jax.sharding.SingleDeviceSharding(device)
    compiled = (
        jax.jit(lax.ragged_dot)
        .lower(
            *(
                jax.ShapeDtypeStruct(shape, "float32", sharding=on_device)
                for shape in shapes
            ),
            jax.ShapeDtypeStruct((num_groups,), "int32", sharding=on_device),
        )
        .compile()
    )
    flops = (compiled.cost_analysis() or {}).get("flops", 0)
    needed = 2 * num_rows * dim * width
    return needed <= flops < 2 * needed


def best_first(lhs):
    """Names of the grouped matmuls for the device of `lhs`, best first.

    The order on GPU and TPU is a guess: nothing has been measured there.
    """
    platform = blocks.platform_of(lhs)
    if platform != "cpu" and ragged_dot_is_sparse(platform):
        return ("ragged_dot", "row_blocks")
    return ("row_blocks",)
