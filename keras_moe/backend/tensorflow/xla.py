"""Keeping loops over TensorArrays away from XLA.

Danger: XLA compiles such a loop without an error and returns wrong values. Two
things keep each `expert_loop` out of its reach: it raises
`NotImplementedError` while XLA traces, and it sends its group sizes through a
string operation, which no XLA compiler accepts, so that whatever still gets
there fails loudly.
"""

import tensorflow as tf
from tensorflow.python.ops import control_flow_util


def compiles_with_xla():
    return not tf.executing_eagerly() and (
        control_flow_util.GraphOrParentsInXlaContext(
            tf.compat.v1.get_default_graph()
        )
    )


def refuse_xla(group_sizes):
    return tf.strings.to_number(tf.strings.as_string(group_sizes), tf.int32)
