"""The examples run, briefly, and leave behind what they promise."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import keras
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run(example, *arguments):
    # The devices that the tests simulate are not for the examples.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.large
class ExamplesTest(unittest.TestCase):
    def test_digits_moe(self):
        backend = keras.config.backend()
        with tempfile.TemporaryDirectory() as folder:
            output = pathlib.Path(folder) / "digits"
            done = run(
                "vision/digits_moe.py",
                *("--backend", backend, "--epochs", "1"),
                *("--output", str(output)),
            )
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            self.assertEqual(
                sorted(path.name for path in output.iterdir()),
                ["moe.keras", "routing.png", "summary.json"],
            )
            summary = json.loads((output / "summary.json").read_text())
            self.assertGreater((output / "routing.png").stat().st_size, 10_000)
        self.assertEqual(summary["backend"], backend)
        self.assertEqual(summary["reloaded_max_difference"], 0.0)
        self.assertEqual(
            summary["moe"]["active_parameters"]
            - summary["dense_twin"]["active_parameters"],
            2 * 64 * 8,  # the routers
        )
        for load in summary["moe_layers"]:
            for kind in ("training_load", "test_load"):
                self.assertAlmostEqual(sum(load[kind]), 1.0, places=5)
            self.assertGreater(min(load["training_load"]), 0.0)
        self.assertIn("test accuracy", done.stdout)

    def test_bad_arguments(self):
        for arguments, message in (
            (("--epochs", "0"), "at least 1"),
            (("--backend", "numpy"), "'numpy'"),
        ):
            done = run("vision/digits_moe.py", *arguments)
            self.assertEqual(done.returncode, 2)
            self.assertIn(message, done.stderr)
