"""The benchmarks run, at sizes that say nothing about speed."""

import argparse
import contextlib
import io
import pathlib
import tempfile
import unittest
import unittest.mock

import keras

import benchmarks
from benchmarks import census
from benchmarks import convolution
from benchmarks import decode
from benchmarks import fit
from benchmarks import latency
from benchmarks import layer
from benchmarks import measure
from benchmarks import multi_gate
from benchmarks import rows
from benchmarks import tables
from benchmarks import vision
from benchmarks import vision_step
from benchmarks.shapes import Shape
from tests.test_case import TestCase

ON_TORCH = keras.config.backend() == "torch"
TINY = Shape(tokens=512, dim=16, intermediate_dim=8, num_experts=4, top_k=2)


class BenchmarksTest(TestCase):
    def setUp(self):
        super().setUp()
        self.arguments = argparse.Namespace(
            backend=keras.config.backend(),
            device="cpu",
            seconds=0.0,
            peers=["all"],
            skew=True,
            xla=False,
            jit="auto",
        )

    def test_layer(self):
        figures = layer.compare(TINY, self.arguments)
        for kind in ("forward", "gradients"):
            self.assertEqual(
                set(figures[kind]),
                {"dense", "keras_moe", "keras_moe, skewed", "all experts"},
            )
            self.assertEqual(figures[kind]["dense"]["ratio"], 1)
        self.assertIn("keras_moe", _printed(layer.report, "x", TINY, figures))

    def test_convolution(self):
        self.arguments.batch = self.arguments.experts = 2
        figures = convolution.compare((4, 2, 2, 3, 2, 2), self.arguments)
        for kind in ("forward", "gradients"):
            self.assertEqual(set(figures[kind]), {"dense", "CondConv2D"})

    def test_vision_step(self):
        self.arguments.batch = 2
        size = {
            **vision_step.SIZE,
            **{"image_shape": (8, 8, 3), "patch_size": 4, "num_heads": 2},
            **{"num_layers": 1, "hidden_dim": 8},
        }
        figures = vision_step.compare(self.arguments, size)
        self.assertEqual(set(figures), set(vision_step.KINDS))
        self.assertIn("Soft MoE", _printed(vision_step.report, figures))

    def test_vision(self):
        """Seeds are one row; other settings are another."""
        runs = [
            {
                **{"model": model, "seed": seed, "patch_size": 7, "epochs": 6},
                **{"hidden_dim": dim, "num_layers": 2, "parameters": 10 * dim},
                "multiplications": 1e4 * dim,
                "validation_accuracy": 0.9,
                "test_accuracy": 0.8 + 0.01 * seed,
                "processor_seconds": 100.0 + seed,
            }
            for model, dim, seed in (
                *(("dense", 64, 0), ("dense", 64, 2), ("vmoe", 64, 0)),
                ("dense", 32, 0),
            )
        ]
        rows = vision.grouped(runs)
        self.assertEqual(
            [(row["model"], row["hidden_dim"]) for row in rows],
            [("dense", 32), ("vmoe", 64), ("dense", 64)],
        )
        table = vision.table(rows)
        self.assertIn("| dense | 2 | 0.64 | 640 | 90.00 ± 0.00 |", table)
        self.assertIn("| 81.00 ± 1.41 | 101 |", table)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "vision.png"
            vision.plot(rows, path)
            self.assertGreater(path.stat().st_size, 5_000)
        with self.assertRaisesRegex(ValueError, "Each seed"):
            vision.grouped([runs[0], runs[0]])

    @unittest.skipUnless(ON_TORCH, "Many steps to compile.")
    def test_step_of_fit(self):
        figures = fit.times(TINY, self.arguments)
        self.assertGreater(
            figures["weights"]["moe"], figures["weights"]["dense"]
        )
        memory = {"above_mb": 1.0}
        figures["memory"] = {kind: memory for kind in fit.KINDS}
        self.assertIn("optimizer", _printed(fit.report, figures))

    def test_few_tokens(self):
        with unittest.mock.patch.multiple(decode, DIM=8, INTERMEDIATE_DIM=8):
            figures = decode.compare(1, self.arguments)
        self.assertEqual(set(figures), {"dense", "8 experts", "128 experts"})

    def test_latency(self):
        models = {
            name: latency.EXPERTS[name] for name in ("SharedBottom", "MMoE")
        }
        with (
            unittest.mock.patch.multiple(
                census, BATCH=8, VOCABULARIES=(3, 4), NUMBERS=1
            ),
            unittest.mock.patch.object(latency, "EXPERTS", models),
        ):
            figures = latency.compare(self.arguments)
            printed = _printed(latency.report, figures)
        self.assertIn("predict_on_batch", printed)
        self.assertGreater(len(figures), 1)
        for of_way in figures.values():
            self.assertEqual(set(of_way), set(models))

    @unittest.skipUnless(ON_TORCH, "Many steps to compile.")
    def test_multi_gate(self):
        with (
            unittest.mock.patch.multiple(
                census, BATCH=8, VOCABULARIES=(3, 4), NUMBERS=1
            ),
            unittest.mock.patch.multiple(
                multi_gate, STEPS=1, SIZES={"small": (2, 2)}
            ),
        ):
            figures = {
                "step": multi_gate.steps(self.arguments),
                "trunk": multi_gate.trunks(self.arguments),
                "start, small": {
                    kind: multi_gate.start(kind, "small", self.arguments)
                    for kind in census.KINDS
                },
            }
            printed = _printed(multi_gate.report, figures)
        self.assertIn("2 experts, 2 tasks", printed)

    def test_rows(self):
        arguments = argparse.Namespace(rows=16, side_rows=None, batch=8)
        with unittest.mock.patch.object(rows, "VOCABULARIES", (30, 20, 10)):
            figures = {
                name: rows.train(name, arguments)
                for name in ("dense", "experts, tables fixed")
            }
        dense, own = figures.values()
        # The twin is as large: within one unit of its hidden layer.
        self.assertLess(
            abs(
                dense["weights_beside_tables"] / own["weights_beside_tables"]
                - 1
            ),
            0.1,
        )
        self.assertIn("peak memory", _printed(rows.report, figures))

    def test_tables_of_what_was_measured(self):
        folder = pathlib.Path(benchmarks.__file__).parent / "results"
        printed = _printed(tables.write, folder)
        for backend in ("jax", "tensorflow", "torch"):
            self.assertIn(f"| keras_moe | {backend} |", printed)

    def test_conditions(self):
        conditions = measure.conditions(self.arguments)
        self.assertIn("keras", conditions["versions"])
        self.assertGreater(conditions["cores"], 0)


def _printed(function, *args):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        function(*args)
    return output.getvalue()
