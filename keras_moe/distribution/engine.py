"""What the engines of `ExpertParallel` have in common."""

import keras

from keras_moe.checks import check_int


class Engine:
    """One way of a backend to compute on several devices.

    A subclass has `num_expert_shards`, `num_data_shards`, `scope()`, and
    `distribute(model)`, whose result is ready for `fit`. Here is what they
    share, and what holds where one process has all devices.
    """

    num_processes = 1
    process_index = 0
    # Whether `dispatch` takes a `meanwhile`, see `sending.send`.
    waits_for_rows = False

    def load_model(self, filepath, custom_objects=None, compile=True):
        with self.scope():
            model = keras.saving.load_model(
                filepath, custom_objects=custom_objects, compile=compile
            )
        return self.distribute(model)

    def train_step(self, model):
        raise NotImplementedError(
            "`train_step` is for TensorFlow, where `fit` cannot train with "
            f"several workers. On {keras.config.backend()!r}, take `fit`."
        )

    def split(self, *arrays, batch_size):
        check_int("batch_size", batch_size, 1)
        size = self.num_processes
        lengths = {len(array) for array in arrays}
        rest = max(lengths) % batch_size
        if len(lengths) > 1 or batch_size % size or rest % size:
            raise ValueError(
                "The number of processes must divide `batch_size`, and the "
                "size of the last batch; all arrays must be equally long. "
                f"Received: batch_size={batch_size}, {size} processes, arrays "
                f"of {sorted(lengths)} examples"
            )
        own = []
        for first in range(0, max(lengths), batch_size):
            number = min(batch_size, max(lengths) - first) // size
            start = first + self.process_index * number
            own += range(start, start + number)
        # Where one process has all, nothing is copied.
        parts = arrays if size == 1 else tuple(array[own] for array in arrays)
        return parts if len(parts) > 1 else parts[0]

    def save_sharded(self, model, folder):
        raise NotImplementedError(
            "`save_sharded` is for PyTorch. On JAX, "
            "`keras.callbacks.OrbaxCheckpoint` writes from each device."
        )

    def load_sharded(self, model, folder):
        raise NotImplementedError("`load_sharded` is for PyTorch.")
