"""PyTorch: several processes train as one does.

Three groups of processes are started, each for many checks of
torch_worker.py: two processes, two of which one dies, and four.
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

    def assert_passes(self, num_processes, *checks):
        statuses, texts = run(self.folder, num_processes, *checks)
        self.assertEqual(statuses, [0] * num_processes, "\n".join(texts))
        passed = [
            line for line in texts[0].splitlines() if line.startswith("passed")
        ]
        self.assertEqual(passed, [f"passed {check}" for check in checks])

    def test_two_processes(self):
        self.assert_passes(
            2,
            *("training", "gradients", "half_precision", "unused_result"),
            *("traffic", "inference", "refusals", "interrupted_save"),
            "batch_normalization",
        )

    def test_one_dies_and_others_go_on(self):
        statuses, texts = run(self.folder, 2, "sharded", "killed")
        self.assertEqual(statuses, [1, 7], "\n".join(texts))
        self.assertIn("passed sharded", texts[0])
        self.assertNotIn("passed killed", texts[0])
        self.assertIn("peer", texts[0])
        # From what they left, one process goes on and then four.
        self.assert_passes(
            4, *("moved", "memory", "gradients:2", "gradients:1")
        )
