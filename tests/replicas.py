"""Several devices: TensorFlow's on this machine, or threads that play them."""

import functools
import threading
from unittest import mock

from keras import ops

from keras_moe import backend


@functools.cache
def two_replicas():
    """One for a process: a second would reuse the keys of its collectives.

    TensorFlow then finds tensors of other shapes than before, and aborts.
    """
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def together(*functions):
    """The results of functions that run as devices which train together.

    Each is a thread, which waits for the others at each sum over the devices.
    """
    number = len(functions)
    barrier = threading.Barrier(number, timeout=60)
    own, added, results = threading.local(), [None] * number, [None] * number
    errors = []

    def all_reduce_sum(x):
        added[own.device] = ops.convert_to_numpy(x)
        barrier.wait()
        total = sum(added)
        barrier.wait()
        return ops.convert_to_tensor(total, x.dtype)

    def run(device):
        own.device = device
        try:
            results[device] = functions[device]()
        except Exception as error:
            errors.append(error)
            barrier.abort()

    with (
        mock.patch.object(backend, "all_reduce_sum", all_reduce_sum),
        mock.patch.object(backend, "world_size", lambda: number),
    ):
        threads = [
            threading.Thread(target=run, args=(i,)) for i in range(number)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results
