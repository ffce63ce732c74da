"""A stream of made-up rows, and a clock for batches."""

import time

import keras
import numpy as np


class Rows(keras.utils.PyDataset):
    """Batches drawn when they are asked for; no row is kept.

    Few ids occur often and many seldom, and the labels depend on some of them.
    """

    def __init__(self, sizes, tasks, rows, batch):
        super().__init__()
        self.sizes, self.tasks = sizes, tasks
        self.rows, self.batch = rows, batch

    def __len__(self):
        return self.rows // self.batch

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        x = {}
        for i, size in enumerate(self.sizes):
            ids = size * rng.random(self.batch, "float32") ** 3
            x[f"c{i}"] = np.minimum(ids, size - 1).astype("int32")
        score = sum(
            np.sin(x[f"c{i}"].astype("float32")) for i in range(min(6, len(x)))
        )
        y = {}
        for i, task in enumerate(self.tasks):
            noise = rng.normal(size=self.batch)
            y[task] = (score + noise > i).astype("float32")[:, None]
        return x, y

    def first(self, batches):
        rows = batches * self.batch
        return Rows(self.sizes, self.tasks, rows, self.batch)


class Clock(keras.callbacks.Callback):
    """When each batch ended, the processor's seconds, and the loss."""

    def on_train_begin(self, logs=None):
        self.ends = []
        self._began = time.process_time()

    def on_train_batch_end(self, batch, logs=None):
        # Reading the loss waits for the step, where steps are dispatched.
        self.loss = float(logs["loss"])
        self.ends.append(time.perf_counter())

    def on_train_end(self, logs=None):
        self.processor_seconds = time.process_time() - self._began
