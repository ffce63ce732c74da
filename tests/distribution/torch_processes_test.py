"""PyTorch: several processes train as one does.

Two groups of processes are started, each for many checks of torch_worker.py:
two, of which one dies in the end, and four that go on from what they left.
"""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import unittest

import keras
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
TIMEOUT = 60

pytestmark = [
    pytest.mark.multi_device,
    pytest.mark.skipif(
        keras.config.backend() != "torch",
        reason="On other backends, one process sees all devices.",
    ),
]


def run(folder, num_processes, *checks):
    """The exit statuses, and what was printed, of processes with checks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "KERAS_MOE_TEST_FOLDER": folder,
        "KERAS_MOE_TEST_TIMEOUT": str(TIMEOUT),
        "OMP_NUM_THREADS": "1",
        # What torchrun sets, without starting a process for it.
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_processes),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distribution.torch_worker", *checks],
            env={**environment, "RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        texts = [p.communicate(timeout=4 * TIMEOUT)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts


class TorchProcessesTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        cls.two_checks = (
            *("training", "gradients", "half_precision", "unused_result"),
            *(
                "traffic",
                "overlap",
                "inference",
                "refusals",
                "interrupted_save",
            ),
            *("batch_normalization", "loss_scaling", "sharded"),
        )
        cls.statuses, cls.texts = run(cls.folder, 2, *cls.two_checks, "killed")

    def test_two_processes(self):
        self.assertEqual(
            passed(self.texts), self.two_checks, "\n".join(self.texts)
        )

    def test_others_of_a_killed_process_end_with_an_error(self):
        self.assertEqual(self.statuses, [1, 7], "\n".join(self.texts))
        self.assertIn("peer", self.texts[0])

    def test_four_processes_go_on(self):
        checks = ("moved", "memory", "gradients:2", "gradients:1")
        statuses, texts = run(self.folder, 4, *checks)
        self.assertEqual(statuses, [0] * 4, "\n".join(texts))
        self.assertEqual(passed(texts), checks)


def passed(texts):
    """The checks that passed, as the first process says."""
    lines = [line.split() for line in texts[0].splitlines()]
    return tuple(line[1] for line in lines if line[:1] == ["passed"])
