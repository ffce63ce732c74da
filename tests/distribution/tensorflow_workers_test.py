"""Two worker processes train with `train_step` as one does with `fit`."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import unittest

import keras
import numpy as np
import pytest

pytestmark = [
    pytest.mark.multi_device,
    pytest.mark.skipif(
        keras.config.backend() != "tensorflow",
        reason="tf.distribute is TensorFlow's",
    ),
]


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distribution.tensorflow_worker"]
        + [str(argument) for argument in arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


class WorkersTest(unittest.TestCase):
    def test_as_fit_in_one_process(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        files = [os.path.join(folder.name, f"{i}.keras") for i in range(3)]
        ports = free_ports(2)
        processes = [
            start(files[0]),
            *(start(files[1 + rank], rank, *ports) for rank in (0, 1)),
        ]
        try:
            outputs = [p.communicate(timeout=300)[0] for p in processes]
        finally:
            for process in processes:
                process.kill()
        alone, *workers = [
            json.loads(output.decode().splitlines()[-1]) for output in outputs
        ]
        self.assertGreater(alone["routing_dropped_fraction"], 0.0)
        wanted = state(files[0])
        for logs, file in zip(workers, files[1:], strict=True):
            self.assertEqual(logs.keys(), alone.keys())
            for name, value in alone.items():
                self.assertAlmostEqual(logs[name], value, delta=1e-5)
            for one, other in zip(state(file), wanted, strict=True):
                scale = max(np.abs(other).max(), 1e-9)
                np.testing.assert_allclose(
                    one, other, rtol=0, atol=1e-5 * scale
                )


def state(file):
    model = keras.saving.load_model(file)
    return [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
