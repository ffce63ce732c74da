"""Every recorded recommendation model, through public layers."""

import re

import numpy as np
from absl.testing import parameterized

from tests import oracle
from tests.recommendation_cases import cases
from tests.test_case import TestCase

NAMED = cases.named()


def is_fault(case):
    """Whether the case records what its source does by mistake."""
    return "asis" in case["case"]


class RecommendationCasesTest(TestCase):
    def test_number_of_cases(self):
        self.assertGreaterEqual(len(NAMED), 35)

    @parameterized.named_parameters(NAMED)
    def test_case(self, path):
        case, arrays = cases.load(path)
        trunk = oracle.trunk_from_case(case, arrays)
        outputs, d_inputs, d_weights = cases.run(
            trunk, _under(arrays, "in"), _under(arrays, "cot")
        )
        if is_fault(case):
            for name, value in _under(arrays, "out").items():
                self.assertGreater(np.abs(outputs[name] - value).max(), 1e-3)
            return
        self.compare(outputs, _under(arrays, "out"), 1e-5)
        self.compare(d_inputs, _under(arrays, "gin"), 1e-4)
        found = trunk.recorded_gradients(d_weights)
        wanted = _under(arrays, "gw")
        for name in set(wanted) - set(found):
            # What the outputs do not depend on has no place in the trunk.
            self.assertIn(name, case["no_gradient_path"])
            self.assertAllEqual(
                wanted.pop(name), np.zeros_like(arrays[f"w/{name}"])
            )
        self.compare(found, wanted, 1e-4)

    @parameterized.named_parameters(NAMED)
    def test_gates(self, path):
        case, arrays = cases.load(path)
        trunk = oracle.trunk_from_case(case, arrays)
        found = trunk.recorded_gates(_under(arrays, "in"))
        recorded = _under(arrays, "gate")
        if found and recorded:
            wanted = {
                _level_and_gate(name, found): value
                for name, value in recorded.items()
            }
            self.assertLessEqual(set(found) - set(wanted), {(1, 0), (1, 1)})
            for key in set(found) & set(wanted):
                self.assertAllClose(found[key], wanted[key], atol=1e-5)

    def compare(self, actual, expected, tolerance):
        self.assertEqual(set(actual), set(expected))
        for name, value in expected.items():
            with self.subTest(name):
                self.assertEqual(actual[name].shape, value.shape)
                scale = max(np.abs(value).max(initial=0.0), 1e-3)
                error = np.abs(actual[name] - value).max(initial=0.0)
                self.assertLessEqual(error, tolerance * scale)

    @parameterized.named_parameters(NAMED)
    def test_one_family_takes_it(self, path):
        case, arrays = cases.load(path)
        taking = oracle.recommendation_families(case["config"], arrays)
        self.assertLen(taking, 1, [family.__name__ for family in taking])

    def test_unknown_case(self):
        with self.assertRaisesRegex(NotImplementedError, "'unheard': 1"):
            oracle.trunk_from_case({"unheard": 1}, {})


def _level_and_gate(name, found):
    """Of names like `l0_unit2`, `l1_shared`, `3`, `b` and `all`."""
    level, gate = re.fullmatch(
        r"(?:l(\d+)_)?(?:unit|task)?(\w+)", name
    ).groups()
    level = int(level or 0)
    if gate == "shared":
        return level, max(g for at, g in found if at == 0)
    if gate.isdigit():
        return level, int(gate)
    return level, 0 if gate == "all" else ord(gate) - ord("a")


def _under(arrays, folder):
    return {
        name.split("/", 1)[1]: value
        for name, value in arrays.items()
        if name.startswith(f"{folder}/")
    }
