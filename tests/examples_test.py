"""The examples run, briefly, and leave behind what they promise."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import keras
import numpy as np
import pytest

import keras_moe
from tests import example_files

ROOT = pathlib.Path(__file__).parent.parent


def start(example, *arguments):
    # The devices that the tests simulate are not for the examples.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / example), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(example, *arguments):
    with start(example, *arguments) as process:
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    return subprocess.CompletedProcess(
        process.args, process.returncode, out, err
    )


def on(backend):
    """Runs a test on one backend: the models are tested on all three."""
    return unittest.skipUnless(
        keras.config.backend() == backend, f"It runs on {backend}."
    )


@pytest.mark.large
class ExamplesTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def test_digits_moe(self):
        backend = keras.config.backend()
        with tempfile.TemporaryDirectory() as folder:
            output = pathlib.Path(folder) / "digits"
            done = run(
                "vision/digits_moe.py",
                *("--backend", backend, "--epochs", "1"),
                # Divides the examples: a smaller batch is compiled again.
                *("--batch-size", "431", "--output", str(output)),
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

    @on("torch")
    def test_diffusion_moe(self):
        done = run(
            "vision/diffusion_moe.py",
            *("--backend", "torch", "--dataset", "digits"),
            *("--epochs", "1", "--steps", "2", "--output", str(self.folder)),
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(
            sorted(path.name for path in self.folder.iterdir()),
            ["diffusion.keras", "routing.png", "samples.png", "summary.json"],
        )
        for name in ("routing.png", "samples.png"):
            self.assertGreater((self.folder / name).stat().st_size, 10_000)
        summary = json.loads((self.folder / "summary.json").read_text())
        self.assertLessEqual(summary["reloaded_max_difference"], 1e-4)
        # Less than the noise, whose mean square is 1.
        self.assertLess(summary["held_out_loss"], 1.0)
        for layers in summary["experts_by_time"].values():
            for shares in layers:
                self.assertAlmostEqual(sum(shares), 1.0, places=5)

    @on("torch")
    def test_upcycle_vit(self):
        data = self.folder / "mnist"
        example_files.write_mnist(data)
        output = self.folder / "output"
        done = run(
            "vision/upcycle_vit.py",
            *("--backend", "torch", "--data", str(data), "--seeds", "1"),
            *("--epochs", "1", "--more-epochs", "1", "--output", str(output)),
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual(
            sorted(path.name for path in output.iterdir()),
            ["routing.png", "summary.json", "upcycled.keras"],
        )
        self.assertGreater((output / "routing.png").stat().st_size, 3_000)
        summary = json.loads((output / "summary.json").read_text())
        self.assertEqual(summary["train_images"], 108)
        copies = summary["results"]["upcycled, copies"][0]
        self.assertLess(copies["difference_at_first"], 1e-4)
        self.assertTrue(1.2 < copies["relative_cost"] < 1.4)
        narrow = summary["results"]["upcycled, half as wide"][0]
        self.assertTrue(1 < narrow["relative_cost"] < 1.02)
        # As many epochs as cost the same.
        for recipe in (copies, narrow):
            epochs = recipe["relative_cost"]
            name = f"dense, {epochs:.1f} epochs more"
            self.assertEqual(summary["results"][name][0]["epochs"], epochs)
        for experts in summary["first_experts"]:
            self.assertEqual(sum(experts), 10 * 7 * 7)
        self.assertRegex(done.stdout, r"upcycled, copies +1\.\d\d +\d+\.\d\d%")

    @on("torch")
    def test_torch_experts(self):
        arguments = ["--epochs", "1", "--output", str(self.folder)]
        for launch, held in (
            (["-m", "torch.distributed.run", "--nproc-per-node", "2"], 4),
            ([], 8),  # goes on from the file
        ):
            done = subprocess.run(
                [sys.executable, *launch]
                + [str(ROOT / "examples" / "distributed" / "torch_experts.py")]
                + arguments,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=600,
            )
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            line = f"Each process holds {held} of 8 experts a layer."
            self.assertEqual(done.stdout.count(line), 1)
        files = [path.name for path in self.folder.iterdir()]
        self.assertEqual(files, ["digits.keras"])

    @pytest.mark.multi_device
    @on("tensorflow")
    def test_tensorflow_experts(self):
        done = run(
            "distributed/tensorflow_experts.py",
            *("--epochs", "1", "--batch-size", "256"),
            *("--output", str(self.folder)),
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("Each device computes 4 of 8 experts", done.stdout)
        self.assertRegex(done.stdout, r"test accuracy \d+\.\d%")
        files = [path.name for path in self.folder.iterdir()]
        self.assertEqual(files, ["digits.keras"])

    @on("torch")
    def test_fashion_mnist(self):
        """A run is killed, and another one goes on."""
        data, output = self.folder / "data", self.folder / "output"
        parts = {
            "train": example_files.images(200, (28, 28), seed=0),
            "t10k": example_files.images(50, (28, 28), seed=1),
        }
        example_files.write_idx(data, parts)
        arguments = (
            *("vision/fashion_mnist_moe.py", "--backend", "torch"),
            *("--data", str(data), "--output", str(output)),
            *("--validation", "50", "--batch-size", "30", "--patch-size", "7"),
            *("--hidden-dim", "32", "--num-layers", "1", "--epochs", "15"),
            *("--learning-rate", "0.01"),
        )
        killed = start(*arguments)
        saved = output / "backup" / "latest.weights.h5"
        while killed.poll() is None and not saved.exists():
            time.sleep(0.02)
        killed.kill()
        killed.communicate()
        self.assertEqual(killed.returncode, -signal.SIGKILL)
        other = run(*arguments, "--resume", "--shift", "2")
        self.assertIn("Received others for: --shift", other.stderr)
        done = run(*arguments, "--resume")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("Going on after epoch ", done.stdout)
        self.assertNotIn("Epoch 1/15", done.stdout)
        self.assertEqual(
            sorted(path.name for path in output.iterdir()),
            ["log.csv", "model.keras", "routing.png", "summary.json"],
        )
        self.assertGreater((output / "routing.png").stat().st_size, 10_000)
        summary = json.loads((output / "summary.json").read_text())
        rows = summary["history"]
        self.assertEqual([row["epoch"] for row in rows], list(range(15)))
        best = max(row["val_accuracy"] for row in rows)
        self.assertAlmostEqual(summary["validation_accuracy"], best, places=5)
        self.assertGreater(summary["test_accuracy"], 0.3)  # by chance: 0.1
        again = run(*arguments, "--resume")
        self.assertIn("has ended", again.stderr)
        # 16 patches of 49 pixels; attention, two experts, a router of 8.
        self.assertEqual(
            summary["multiplications"],
            16 * (49 * 32 + 32 * (4 * 32 + 2 * 16) + 2 * 32 * 128 + 32 * 8)
            + 32 * 10,
        )

    @on("torch")
    def test_cifar10(self):
        data, output = self.folder / "data.npz", self.folder / "output"
        images = example_files.images(100, (32, 32, 3), seed=0)
        np.savez(data, x_train=images[0], y_train=images[1])
        done = run(
            *("vision/cifar10_moe.py", "--backend", "torch"),
            *("--data", str(data), "--output", str(output)),
            *("--model", "soft_moe", "--mixed-precision", "--no-test"),
            *("--validation", "30", "--batch-size", "30", "--patch-size", "8"),
            *("--hidden-dim", "32", "--num-layers", "2"),
            *("--epochs", "30", "--patience", "1", "--learning-rate", "1e-9"),
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        summary = json.loads((output / "summary.json").read_text())
        self.assertIsNone(summary["test_accuracy"])
        # It hardly learns, so it is stopped.
        self.assertLess(summary["epochs_trained"], 30)
        self.assertEqual(summary["moe_layers"], [0, 1])
        self.assertGreater((output / "routing.png").stat().st_size, 10_000)
        model = keras.models.load_model(output / "model.keras")
        self.assertIsInstance(model.backbone, keras_moe.models.SoftMoEBackbone)
        self.assertEqual(model.backbone.compute_dtype, "bfloat16")

    def run_recommendation(self, example, files, *arguments):
        """Runs an example, and returns its output and `summary.json`."""
        output = self.folder / "output"
        done = run(
            f"recommendation/{example}.py",
            *("--backend", keras.config.backend(), "--epochs", "1"),
            *("--output", str(output)),
            *arguments,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        found = sorted(path.name for path in output.iterdir())
        self.assertEqual(found, sorted([*files, "summary.json", "gates.png"]))
        self.assertGreater((output / "gates.png").stat().st_size, 3_000)
        summary = json.loads((output / "summary.json").read_text())
        self.assertLessEqual(summary["reloaded_max_difference"], 1e-6)
        return done.stdout, summary

    @on("torch")
    def test_census(self):
        data = self.folder / "census"
        data.write_text("\n".join(example_files.census_lines(300)) + "\n")
        out, summary = self.run_recommendation(
            "census_multitask",
            ["SharedBottom.keras", "PLE.keras"],
            *("--data", str(data), "--models", "PLE,SharedBottom"),
            *("--seeds", "1", "--batch-size", "64"),
        )
        self.assertEqual(sum(summary["rows"].values()), 300)
        self.assertEqual(summary["distinct_rows"], 300)
        self.assertRegex(out, r"PLE +[\d,]+ +0\.\d{4} +0\.\d{4}")
        for gates in summary["gates"].values():
            for means in gates.values():
                self.assertAlmostEqual(sum(means), 1.0, places=3)
        self.assertEqual(
            summary["gates"]["PLE, level 2"]["income"][4:8], [0] * 4
        )

    @on("tensorflow")
    def test_movielens(self):
        data = self.folder / "ml-1m"
        example_files.write_1m(data)
        out, summary = self.run_recommendation(
            "movielens_multitask",
            ["MMoE.keras"],
            *("--data", str(data), "--models", "MMoE"),
        )
        rows = sum(summary["rows"].values())
        self.assertEqual(rows, len(example_files.RATINGS))
        self.assertIn("stars RMSE", out)

    @on("torch")
    def test_synthetic_relatedness(self):
        out, summary = self.run_recommendation(
            "synthetic_relatedness",
            ["MMoE.keras"],
            *("--repeats", "2", "--examples", "64", "--correlations", "0.5"),
        )
        losses = summary["losses"]["0.5"]
        difference = np.subtract(losses["SharedBottom"], losses["MMoE"])
        mean, error, _ = summary["gaps"]["0.5"]["MMoE below SharedBottom"]
        self.assertAlmostEqual(mean, difference.mean())
        self.assertAlmostEqual(error, abs(np.diff(difference)[0]) / 2)
        counts = summary["parameters"].values()
        self.assertLess(max(counts) / min(counts), 1.06)

    @on("jax")
    def test_two_stage(self):
        out, summary = self.run_recommendation(
            "two_stage",
            ["ranker.keras", "user_tower.keras", "item_tower.keras"],
            *("--users", "20", "--items", "60", "--candidates", "20"),
        )
        self.assertIn("candidates hold", out)
        for row in summary["orders"].values():
            self.assertLessEqual(
                row["recall@10"], summary["recall_of_candidates"]
            )

    def test_bad_arguments(self):
        vision, stages = "vision/digits_moe.py", "recommendation/two_stage.py"
        diffusion = "vision/diffusion_moe.py"
        fashion = "vision/fashion_mnist_moe.py"
        for example, arguments, message in (
            ("vision/upcycle_vit.py", ("--seeds", "0"), "at least 1"),
            (vision, ("--epochs", "0"), "at least 1"),
            (vision, ("--backend", "numpy"), "'numpy'"),
            (diffusion, ("--dataset", "x"), "digits. Received: 'x'"),
            (diffusion, ("--dataset", "digits", "--data", "x"), "--data is"),
            (fashion, ("--model", "moe"), "'moe'"),
            (fashion, ("--hidden-dim", "40"), "multiple of 32"),
            (fashion, ("--learning-rate", "0"), "between 0 and 1"),
            (fashion, ("--data", "no such"), "'no such'"),
            (stages, ("--candidates", "9"), "at least 10"),
            (stages, ("--backend", "numpy"), "'numpy'"),
        ):
            done = run(example, *arguments)
            self.assertEqual(done.returncode, 2)
            self.assertIn(message, done.stderr)
