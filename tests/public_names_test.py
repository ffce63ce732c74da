"""Every public name resolves, is documented, and its examples run."""

import doctest
import importlib
import inspect
import subprocess
import sys
import unittest

import keras
import numpy as np

import keras_moe

FOLDERS = (
    *("callbacks", "conversion", "dispatch", "distribution", "experts"),
    *("layers", "losses", "metrics", "models", "ops", "routers"),
)


def public_names():
    for folder in FOLDERS:
        module = importlib.import_module(f"keras_moe.{folder}")
        for name in sorted(vars(module)):
            value = getattr(module, name)
            if not name.startswith("_") and not inspect.ismodule(value):
                yield f"keras_moe.{folder}.{name}", value


class PublicNamesTest(unittest.TestCase):
    def test_names(self):
        names = dict(public_names())
        for name in (
            "keras_moe.layers.MoE",
            "keras_moe.routers.TopKRouter",
            "keras_moe.routers.Router",
            "keras_moe.routers.Routing",
            "keras_moe.experts.GLUExperts",
            "keras_moe.experts.MLPExperts",
            "keras_moe.experts.Experts",
            "keras_moe.losses.LoadBalancingLoss",
            "keras_moe.losses.RouterZLoss",
            "keras_moe.losses.RoutingLoss",
            "keras_moe.ops.grouped_matmul",
            "keras_moe.ops.dispatch",
            "keras_moe.ops.combine",
        ):
            self.assertIn(name, names)
        for folder in FOLDERS:
            self.assertTrue(inspect.ismodule(getattr(keras_moe, folder)))
        self.assertRegex(keras_moe.__version__, r"^\d+\.\d+\.\d+")

    def test_each_is_our_own_and_documented(self):
        for name, value in public_names():
            self.assertTrue(value.__module__.startswith("keras_moe."), name)
            self.assertTrue(inspect.getdoc(value), name)

    def test_saved_names(self):
        for _, value in public_names():
            base = inspect.isclass(value) and value.__name__ in (
                "Experts",
                "LinearRouter",
                "RankingRouter",
                "Router",
                "RoutingLoss",
            )
            if hasattr(value, "get_config") and not base:
                registered = keras.saving.get_registered_name(value)
                self.assertEqual(registered, f"keras_moe>{value.__name__}")

    @unittest.skipIf(
        keras.config.backend() == "jax",
        "They compile for minutes, and each class has tests on JAX.",
    )
    def test_examples(self):
        examples = 0
        for name, value in public_names():
            finder = doctest.DocTestFinder(recurse=False)
            globals_ = {"keras": keras, "keras_moe": keras_moe, "np": np}
            for test in finder.find(value, name, globs=globals_):
                runner = doctest.DocTestRunner(
                    optionflags=doctest.NORMALIZE_WHITESPACE
                )
                runner.run(test)
                results = runner.summarize(verbose=False)
                self.assertEqual(results.failed, 0, name)
                examples += results.attempted
        self.assertGreater(examples, 15)

    def test_nothing_optional_is_imported(self):
        program = (
            "import sys, keras; before = set(sys.modules); import keras_moe; "
            "new = set(sys.modules) - before; "
            "found = new & {'pandas', 'tensorflow', 'torch', 'jax', "
            "'keras_hub', 'keras_rs', 'tensorboard', 'matplotlib'}; "
            "sys.exit(f'imported {found}' if found else 0)"
        )
        subprocess.run([sys.executable, "-c", program], check=True)
