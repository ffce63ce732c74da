"""The benchmarks run, at sizes that say nothing about speed."""

import argparse
import contextlib
import io
import pathlib
import unittest.mock

import keras

import benchmarks
from benchmarks import decode
from benchmarks import fit
from benchmarks import layer
from benchmarks import measure
from benchmarks import tables
from benchmarks.shapes import Shape
from tests.test_case import TestCase

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
