"""Two worker processes of a MultiWorkerMirroredStrategy, with an own loop.

Keras' `fit` fails under that strategy.
"""

import json
import os
import socket
import subprocess
import sys
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
    def test_as_one_process(self):
        ports = free_ports(2)
        processes = [start(), *(start(rank, *ports) for rank in (0, 1))]
        try:
            outputs = [p.communicate(timeout=300)[0] for p in processes]
        finally:
            for process in processes:
                process.kill()
        alone, *workers = [
            json.loads(output.decode().splitlines()[-1]) for output in outputs
        ]
        for worker in workers:
            self.assertAlmostEqual(worker["loss"], alone["loss"], delta=1e-5)
            for one, other in zip(
                worker["values"], alone["values"], strict=True
            ):
                np.testing.assert_allclose(one, other, atol=1e-5)
