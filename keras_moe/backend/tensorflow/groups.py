"""A loop over the groups that have rows, for eager and graph mode.

Results wait in `TensorArray`s. A tensor handed from iteration to iteration, to
be added to or written into, takes longer: TensorFlow's scatters are slow.

Danger: XLA compiles a loop over TensorArrays without an error and returns wrong
values. Two things keep each `expert_loop` out of its reach: it raises
`NotImplementedError` while XLA traces, and it sends its group sizes through a
string operation, which no XLA compiler accepts, so that whatever still gets
there fails loudly.
"""

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

# Groups computed at the same time: no core waits for the end of a product.
PARALLEL = 8


def compiles_with_xla():
    return not tf.executing_eagerly() and (
        control_flow_util.GraphOrParentsInXlaContext(
            tf.compat.v1.get_default_graph()
        )
    )


def refuse_xla(group_sizes):
    return tf.strings.to_number(tf.strings.as_string(group_sizes), tf.int32)


class Groups:
    """Where the rows of the groups are, and arrays of results for them."""

    def __init__(self, group_sizes, num_rows):
        group_sizes = refuse_xla(group_sizes)
        self._ends = tf.cumsum(group_sizes)
        self._starts = self._ends - group_sizes
        self._num_rows = num_rows
        self._num_groups = group_sizes.shape[0]
        self._with_rows = tf.cast(tf.where(group_sizes > 0)[:, 0], tf.int32)
        self._count = tf.size(self._with_rows)

    def locate(self, i):
        """The `i`-th group with rows, and a slice of its rows."""
        group = self._with_rows[i]
        return group, slice(self._starts[group], self._ends[group])

    def loop(self, step, *arrays):
        """Calls `arrays = step(i, *arrays)` for each group with rows."""
        return tf.while_loop(
            lambda i, *arrays: i < self._count,
            lambda i, *arrays: (i + 1, *step(i, *arrays)),
            (tf.constant(0), *arrays),
            parallel_iterations=PARALLEL,
        )[1:]

    def array_of_rows(self, dtype, *shape):
        """Takes the rows of the `i`-th group with rows at index `i`."""
        return tf.TensorArray(
            dtype,
            self._count + 1,
            clear_after_read=False,
            element_shape=(None, *shape),
            infer_shape=False,
        )

    def concat(self, array):
        """All rows, `(N, ...)`; unused rows are zero."""
        shape = (self._num_rows - self._ends[-1], *array.element_shape[1:])
        array = array.write(self._count, tf.zeros(shape, array.dtype))
        return array.concat()

    def array_of_groups(self, dtype, shape):
        """Takes one tensor of each group. What is not written is zero."""
        return tf.TensorArray(dtype, self._num_groups, element_shape=shape)
