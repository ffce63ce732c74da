"""What crosses devices: one program for all of them, and rows that travel."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from keras_moe.backend.jax import ragged_rows


def batch_sharding(mesh, axes, rank):
    """How the first axis of a tensor lies on the named axes of a mesh."""
    return NamedSharding(mesh, PartitionSpec(axes, *[None] * (rank - 1)))


def per_device(function, mesh, arrays, specs, out_specs):
    """Runs a function on each device, on the device's parts of the arrays.

    Args:
        function: Takes the parts, and returns parts of the outputs.
        mesh: `jax.sharding.Mesh`.
        arrays: tuple of arrays.
        specs, out_specs: For each array, and each output, a tuple with the mesh
            axes (a name, a tuple of names or `None`) that divide each of its
            axes; further axes are whole.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(PartitionSpec(*spec) for spec in specs),
        out_specs=tuple(PartitionSpec(*spec) for spec in out_specs),
        # The kernels' own gradients do not say over which axes values vary.
        check_vma=False,
    )(*arrays)


def device_index(axes):
    return lax.axis_index(axes)


def sum_over(tensor, axes):
    return lax.psum(tensor, axes)


def exchange_rows(
    rows, group_sizes, compute, weights, seeds, axis, slack, ragged=False
):
    """Sends rows to the devices that own their experts, and results back.

    In a round, each device has room for the same number of rows from every
    other, which XLA can plan. The first round has room for an even division and
    `slack` more, and mostly suffices. Further rounds, of a quarter of that, run
    as long as any device has rows left, so no row is lost and memory does not
    grow.

    Args:
        rows: `(N, D)`, the rows of expert 0 first; rows beyond the groups are
            not sent.
        group_sizes: `(E,)` int32.
        compute: `compute(rows (M, D), experts (M,), weights, first, seeds) ->
            (M, F)`, for rows in any order with the number of their expert on
            this device, `E / owners` for unused rows. `first` differs between
            rounds. It must have no other effect.
        weights: The weights of the experts on this device, arrays that get a
            gradient.
        seeds: list of arrays that get none.
        axis: Name of the mesh axis whose devices own the experts.
        slack: float. Room of the first round beyond the even division.
        ragged: bool. Whether only the rows travel that there are, which
            XLA:CPU cannot do, or all that there is room for.

    Returns:
        `(N, F)`; zero for rows that were not sent.
    """
    owners = lax.axis_size(axis)
    num_rows = rows.shape[0]
    sizes = group_sizes.astype("int32").reshape(owners, -1)  # by owner
    sent = jnp.sum(sizes, axis=1)
    arriving = lax.all_to_all(sizes, axis, 0, 0, tiled=True)  # by source
    most = lax.pmax(jnp.max(sent), axis)
    even = num_rows / owners
    first_size = min(_round_up(even * (1 + slack)), num_rows)
    next_size = min(_round_up(even / 4), num_rows)
    tables = (sent, jnp.sum(arriving, axis=1), None)
    deliver, collect = _deliver, _collect
    if ragged:
        starts = jnp.cumsum(sent) - sent
        theirs = lax.all_to_all(starts, axis, 0, 0, tiled=True)
        tables = (*tables[:2], theirs)
        deliver, collect = ragged_rows.deliver, ragged_rows.collect
    constants = (tables, jnp.cumsum(arriving, axis=1), seeds)

    def one_round(first, size, rows, weights, constants):
        tables, ends, seeds = constants
        received = deliver(rows, tables, first, size, axis)
        place = first + jnp.arange(size, dtype="int32")
        # A source's rows are sorted by expert; `ends` is where each one stops.
        experts = jnp.sum(place[None, :, None] >= ends[:, None, :], axis=-1)
        experts = experts.reshape(-1).astype("int32")
        results = compute(received, experts, weights, first, seeds)
        return collect(results, tables, first, num_rows, axis)

    if first_size >= num_rows:  # it has room for any division
        return one_round(0, num_rows, rows, weights, constants)
    return _in_rounds(
        one_round, first_size, next_size, rows, weights, (most, *constants)
    )


def _in_rounds(one_round, first_size, next_size, rows, weights, constants):
    """The sum of as many rounds as it takes to send all rows."""

    # All arrays are arguments: a function with a gradient of its own should not
    # close over traced ones.
    @jax.custom_vjp
    def run(rows, weights, constants):
        return forward(rows, weights, constants)[0]

    def forward(rows, weights, constants):
        most, *constants = constants
        total, first_gradients = jax.vjp(
            lambda rows, weights: one_round(
                0, first_size, rows, weights, constants
            ),
            rows,
            weights,
        )

        def body(state):
            first, total = state
            more = one_round(first, next_size, rows, weights, constants)
            return first + next_size, total + more

        _, total = lax.while_loop(
            lambda state: state[0] < most, body, (jnp.int32(first_size), total)
        )
        return total, (first_gradients, rows, weights, (most, *constants))

    def backward(residuals, grad):
        first_gradients, rows, weights, (most, *constants) = residuals

        def body(state):
            first, gradients = state
            _, vjp = jax.vjp(
                lambda rows, weights: one_round(
                    first, next_size, rows, weights, constants
                ),
                rows,
                weights,
            )
            more = vjp(grad)
            return first + next_size, jax.tree.map(jnp.add, gradients, more)

        _, gradients = lax.while_loop(
            lambda state: state[0] < most,
            body,
            (jnp.int32(first_size), first_gradients(grad)),
        )
        return *gradients, None

    run.defvjp(forward, backward)
    return run(rows, weights, constants)


def _round_up(size):
    """To a multiple of 8 rows, which products like."""
    return max(8, -int(-size // 8) * 8)


def _deliver(rows, tables, first, size, axis):
    """`(N, D)` -> `(owners * size, D)`, by source; zeros for unused rows."""
    packed = _pack(rows, tables[0], first, size)  # (owners, size, D)
    received = lax.all_to_all(packed, axis, 0, 0, tiled=True)
    return received.reshape(-1, *rows.shape[1:])


def _collect(results, tables, first, num_rows, axis):
    """`(owners * size, F)` -> `(N, F)`, zeros for what was not sent."""
    owners = tables[0].shape[0]
    results = results.reshape(owners, -1, *results.shape[1:])
    results = lax.all_to_all(results, axis, 0, 0, tiled=True)
    return _unpack(results, tables[0], first, num_rows)


# Packing and unpacking are each other's transposes. Both gather: the gradient
# of a gather, a scatter, is slow.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pack(rows, sent, first, size):
    """The next `size` rows of each owner, from `first` on, zeros if fewer."""
    starts = jnp.cumsum(sent) - sent
    place = first + jnp.arange(size, dtype="int32")  # (size,)
    index = jnp.clip(starts[:, None] + place, 0, rows.shape[0] - 1)
    packed = rows[index]
    missing = (1,) * (rows.ndim - 1)
    exists = (place < sent[:, None]).reshape(*index.shape, *missing)
    return jnp.where(exists, packed, jnp.zeros_like(packed))


def _pack_forward(rows, sent, first, size):
    residuals = (sent, first, jnp.zeros((rows.shape[0], 0)))
    return _pack(rows, sent, first, size), residuals


def _pack_backward(size, residuals, grad):
    sent, first, like_rows = residuals
    return _unpack(grad, sent, first, like_rows.shape[0]), None, None


_pack.defvjp(_pack_forward, _pack_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _unpack(packed, sent, first, num_rows):
    """Rows `(num_rows, D)` from those of each owner, zeros where not there."""
    size = packed.shape[1]
    ends = jnp.cumsum(sent)
    row = jnp.arange(num_rows, dtype="int32")
    owner = jnp.sum(row[:, None] >= ends, axis=-1)
    owner = jnp.minimum(owner, sent.shape[0] - 1)
    place = row - (ends - sent)[owner] - first
    exists = (place >= 0) & (place < size) & (row < ends[-1])
    flat = packed.reshape(-1, *packed.shape[2:])
    rows = flat[owner * size + jnp.clip(place, 0, size - 1)]
    exists = exists.reshape(-1, *(1,) * (rows.ndim - 1))
    return jnp.where(exists, rows, jnp.zeros_like(rows))


def _unpack_forward(packed, sent, first, num_rows):
    residuals = (sent, first, jnp.zeros((packed.shape[1], 0)))
    return _unpack(packed, sent, first, num_rows), residuals


def _unpack_backward(num_rows, residuals, grad):
    sent, first, like_round = residuals
    return _pack(grad, sent, first, like_round.shape[0]), None, None


_unpack.defvjp(_unpack_forward, _unpack_backward)
