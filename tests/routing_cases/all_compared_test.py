"""Every recorded array is named by a test of its family, or here with a reason.

A program cannot tell whether a test compares what it names. But an array that
no test names is compared by none.
"""

import ast
import importlib
import pathlib
import re
import unittest

from tests.routing_cases import cases

HERE = pathlib.Path(__file__).parent
# Files of no family.
SHARED = ("__init__", "cases")
# Other files that tests of a family are in.
ELSEWHERE = {"noisy_top_k": ["../losses/load_loss_test.py"]}

NOT_COMPARED = {
    "base_assignment": {
        "order": "how fairseq sorts tokens before it sends them",
    },
    "dselectk": {"codes": "the binary numbers of the experts"},
    "entmax": {
        "(p|grad)/(budget|normmax).*": "no router has these maps",
        "loss/.*": "no loss of routing; their gradients are compared",
    },
    "megatron_quantile": {
        ".*": "beside the bias and the choices, what they come from",
    },
    "soft_moe": {
        "y_bfloat16_path": "the same in bfloat16; y is in float32",
        "metric/.*": "statistics that no layer here shows",
    },
    "tutel": {
        "location": "places in queues, here rows of a sorted batch",
        "kept": "combine_kept above 0",
    },
    "vmoe": {
        "buffers": "rows of experts, here in another order",
    },
    "expert_choice": {
        "buffers": "rows of experts, here in another order",
        "metric/.*": "statistics that no layer here shows",
    },
}


def families():
    """`{name: (matches, names in its tests)}`."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        name = path.stem
        if name in SHARED or name.endswith("_test"):
            continue
        module = importlib.import_module(f"tests.routing_cases.{name}")
        sources = [path, HERE / f"{name}_test.py"]
        sources += [HERE / other for other in ELSEWHERE.get(name, ())]
        trees = [ast.parse(source.read_text()) for source in sources]
        found[name] = module.matches, set().union(*map(names_in, trees))
        if name == "megatron":
            quantile = module.is_quantile_balancing
            found["megatron_quantile"] = quantile, found[name][1]
    return found


def names_in(tree):
    """Patterns of the strings in a file, and of their parts around each `/`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = [node.value]
        elif isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", None) for part in node.values]
        else:
            continue
        parts = [part if isinstance(part, str) else None for part in parts]
        if not any(re.search(r"\w", part or "") for part in parts):
            continue
        text = "".join("*" if part is None else part for part in parts)
        if text.endswith(("/", ".")):
            yield re.escape(text) + ".+"  # what keys start with
        for part in (text, *(p for p in text.split("/") if p[:1].isalpha())):
            yield re.escape(part).replace(r"\*", "[^/]+")


def is_named(key, names):
    def known(text):
        return any(re.fullmatch(name, text) for name in names)

    return known(key) or all(known(part) for part in key.split("/"))


class AllComparedTest(unittest.TestCase):
    def test_every_case_has_a_family(self):
        everything = cases.find(lambda config, arrays: True)
        known = families()
        for name, config, arrays in everything:
            matching = [
                family
                for family, (matches, _) in known.items()
                if matches(config, arrays)
            ]
            self.assertTrue(matching, name)

    def test_every_array_is_named(self):
        forgotten = set()
        for family, (matches, names) in families().items():
            reasons = NOT_COMPARED.get(family, {})
            for _, _, arrays in cases.find(matches):
                for key in arrays:
                    listed = any(re.fullmatch(p, key) for p in reasons)
                    if not listed and not is_named(key, names):
                        forgotten.add(f"{family}: {key}")
        self.assertEqual(sorted(forgotten), [])

    def test_reasons_are_needed(self):
        known = families()
        for family, reasons in NOT_COMPARED.items():
            keys = {
                key
                for _, _, arrays in cases.find(known[family][0])
                for key in arrays
            }
            for pattern in reasons:
                if family != "megatron_quantile":
                    self.assertTrue(
                        any(re.fullmatch(pattern, key) for key in keys),
                        f"{family}: {pattern}",
                    )

    def test_it_finds_what_is_forgotten(self):
        tree = ast.parse(
            "a['loss/aux'], a[f'grad_{name}/x'], a[f'layer{i}/w'], f'{p}/y'"
        )
        names = set(names_in(tree))
        for key in ("loss/aux", "grad_z/x", "layer1/w"):
            self.assertTrue(is_named(key, names), key)
        for key in ("loss/z", "grad_z/b", "locations", "x2"):
            self.assertFalse(is_named(key, names), key)
