"""The strategy of the TensorFlow tests that run on several devices."""

import functools


@functools.cache
def two_replicas():
    """One for a process: a second would reuse the keys of its collectives.

    TensorFlow then finds tensors of other shapes than before, and aborts.
    """
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
