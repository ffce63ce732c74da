"""The guides run, in this process, and show what they say they show."""

import importlib.util
import pathlib
import re
import unittest

import numpy as np

GUIDES = pathlib.Path(__file__).parent.parent / "guides"


def load(name):
    path = GUIDES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, path.read_text()


class GuidesTest(unittest.TestCase):
    def test_custom_router(self):
        module, text = load("custom_router")
        losses, indices, difference = module.main()
        self.assertLess(losses[-1], 0.3 * losses[0])
        # Different clusters go to different pairs of experts.
        pairs = {tuple(sorted(pair)) for pair in np.asarray(indices)}
        self.assertGreaterEqual(len(pairs), 2)
        self.assertLess(difference, 1e-6)
        # A router of one's own takes one class of under 40 lines.
        source = re.search(
            r"^class PrototypeRouter.*?(?=^# )", text, re.DOTALL | re.MULTILINE
        )
        self.assertLess(len(source.group().strip().splitlines()), 40)

    def test_recommendation(self):
        module, _ = load("recommendation")
        logs, gates, difference = module.main()
        # A model without the features would have 0.5.
        self.assertGreater(logs["click_auc"], 0.7)
        self.assertGreater(logs["buy_auc"], 0.75)
        self.assertEqual(set(gates), {"click", "buy"})
        for weights in gates.values():
            np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-5)
        self.assertLess(difference, 1e-6)
