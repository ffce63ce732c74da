"""Grouped matmuls.

`expert_loop`, for eager and graph mode, is a loop with one product for each
group with rows. `row_blocks`, for XLA, where every shape is static, is a loop
over blocks of rows whose trip count is data.
"""

import tensorflow as tf

from keras_moe.backend.tensorflow.groups import Groups
from keras_moe.backend.tensorflow.groups import compiles_with_xla


def _loop_rows(lhs, rhs, groups, transpose_rhs=False):
    def step(i, products):
        group, rows = groups.locate(i)
        product = tf.matmul(lhs[rows], rhs[group], transpose_b=transpose_rhs)
        return (products.write(i, product),)

    width = rhs.shape[1] if transpose_rhs else rhs.shape[2]
    (products,) = groups.loop(step, groups.array_of_rows(lhs.dtype, width))
    return tf.ensure_shape(groups.concat(products), (lhs.shape[0], width))


def _loop_groups(lhs, grad, groups):
    def step(i, products):
        group, rows = groups.locate(i)
        product = tf.matmul(lhs[rows], grad[rows], transpose_a=True)
        return (products.write(group, product),)

    shape = (lhs.shape[1], grad.shape[1])
    (products,) = groups.loop(step, groups.array_of_groups(lhs.dtype, shape))
    return products.stack()


def expert_loop(lhs, rhs, group_sizes):
    if compiles_with_xla():
        raise NotImplementedError("XLA needs static shapes")
    # A variable read inside of a custom gradient would be asked for there.
    lhs, rhs = tf.convert_to_tensor(lhs), tf.convert_to_tensor(rhs)
    groups = Groups(group_sizes, tf.shape(lhs)[0])

    @tf.custom_gradient
    def forward(lhs, rhs):
        def backward(grad):
            return (
                _loop_rows(grad, rhs, groups, transpose_rhs=True),
                _loop_groups(lhs, grad, groups),
            )

        return _loop_rows(lhs, rhs, groups), backward

    return forward(lhs, rhs)


def block_size(num_rows, num_groups):
    """Rows of a block: a quarter of the average group, if that is known."""
    if num_rows is None:
        return 64
    quarter = max(num_rows // num_groups // 4, 1)
    return min(max(2 ** (quarter.bit_length() - 1), 8), 256)


class _Blocks:
    """Where the blocks of rows of each group start and stop.

    Whatever depends on data is read with `tf.gather`. XLA wants the bounds of
    a slice at compile time, and would compile anew for every batch to get them.
    """

    def __init__(self, num_rows, group_sizes, size):
        self.size = size
        self.num_rows = num_rows
        self.num_groups = group_sizes.shape[0]
        self.ends = tf.cumsum(group_sizes)
        self.starts = self.ends - group_sizes
        blocks_of_group = -(-group_sizes // size)
        self.last = tf.cumsum(blocks_of_group)
        self.first = self.last - blocks_of_group
        self.count = tf.reduce_sum(blocks_of_group)
        # Each group leaves at most one block incomplete.
        self.maximum = num_rows // size + self.num_groups

    def locate(self, block):
        """The group of a block, its rows, and which of them are the group's."""
        group = tf.reduce_sum(tf.cast(self.last <= block, tf.int32))
        in_group = block - tf.gather(self.first, group)
        rows = tf.gather(self.starts, group) + in_group * self.size
        rows = rows + tf.range(self.size)
        own = rows < tf.gather(self.ends, group)
        return group, tf.minimum(rows, self.num_rows - 1), own

    def places(self):
        """Index of each row among the rows of all blocks laid end to end."""
        row = tf.range(self.num_rows)
        group = tf.reduce_sum(
            tf.cast(self.ends[None, :] <= row[:, None], tf.int32), axis=1
        )
        in_a_group = group < self.num_groups
        offset = self.first * self.size - self.starts
        place = row + tf.gather(offset, tf.minimum(group, self.num_groups - 1))
        return tf.where(in_a_group, place, 0), in_a_group[:, None]


def _loop(num_steps, body, state):
    """Calls `state = body(i, state)` for `i` in `range(num_steps)`."""
    return tf.while_loop(
        lambda i, state: i < num_steps,
        lambda i, state: (i + 1, body(i, state)),
        (tf.constant(0), state),
        parallel_iterations=1,
    )[1]


def _block_rows(lhs, rhs, blocks, transpose_rhs=False):
    width = rhs.shape[1] if transpose_rhs else rhs.shape[2]

    def body(i, products):
        group, rows, _ = blocks.locate(i)
        product = tf.matmul(
            tf.gather(lhs, rows),
            tf.gather(rhs, group),
            transpose_b=transpose_rhs,
        )
        return products.write(i, product)

    products = _loop(
        blocks.count,
        body,
        tf.TensorArray(
            lhs.dtype, blocks.maximum, element_shape=(blocks.size, width)
        ),
    ).stack()
    place, in_a_group = blocks.places()
    out = tf.gather(tf.reshape(products, (-1, width)), place)
    out = tf.where(in_a_group, out, tf.zeros_like(out))
    return tf.ensure_shape(out, (lhs.shape[0], width))


def _block_groups(lhs, grad, blocks):
    accumulator = tf.float64 if lhs.dtype == tf.float64 else tf.float32

    def body(i, out):
        group, rows, own = blocks.locate(i)
        x, g = tf.gather(lhs, rows), tf.gather(grad, rows)
        # Both, since zero times a NaN of another group is NaN.
        product = tf.matmul(
            tf.where(own[:, None], x, tf.zeros_like(x)),
            tf.where(own[:, None], g, tf.zeros_like(g)),
            transpose_a=True,
        )
        return tf.tensor_scatter_nd_add(
            out, [[group]], [tf.cast(product, accumulator)]
        )

    shape = (blocks.num_groups, lhs.shape[1], grad.shape[1])
    out = _loop(blocks.count, body, tf.zeros(shape, accumulator))
    return tf.cast(out, lhs.dtype)


def row_blocks(lhs, rhs, group_sizes):
    lhs, rhs = tf.convert_to_tensor(lhs), tf.convert_to_tensor(rhs)
    if not lhs.shape[0]:
        # XLA cannot gather from no rows, and there may be none.
        num_rows = tf.shape(lhs)[0]
        lhs = tf.pad(lhs, ((0, 1), (0, 0)))
        return _row_blocks(lhs, rhs, group_sizes)[:num_rows]
    return _row_blocks(lhs, rhs, group_sizes)


def _row_blocks(lhs, rhs, group_sizes):
    size = block_size(lhs.shape[0], rhs.shape[0])
    blocks = _Blocks(tf.shape(lhs)[0], group_sizes, size)

    @tf.custom_gradient
    def forward(lhs, rhs):
        def backward(grad):
            return (
                _block_rows(grad, rhs, blocks, transpose_rhs=True),
                _block_groups(lhs, grad, blocks),
            )

        return _block_rows(lhs, rhs, blocks), backward

    return forward(lhs, rhs)
