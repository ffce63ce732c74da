"""Who may import whom: reads the imports of every file of the library."""

import ast
import pathlib
import unittest

import keras_moe

ROOT = pathlib.Path(keras_moe.__file__).parent
# Folder -> what it may import of the library, besides itself.
ALLOWED = {
    "backend": set(),
    "ops": {"backend"},
    "routers": {"ops", "backend"},
    "experts": {"ops", "backend"},
    "losses": {"ops", "backend"},
    "distribution": {"ops", "backend"},
    "layers": {"routers", "experts", "losses", "distribution"},
    "metrics": {"layers"},
    "callbacks": {"layers"},
    "analysis": {"layers"},
    "conversion": {"layers"},
    "models": {"layers", "metrics", "callbacks", "analysis", "conversion"},
}
FRAMEWORKS = {"jax", "jaxlib", "tensorflow", "torch"}
EVERYWHERE = {
    *("keras", "numpy"),
    *("contextlib", "fractions", "functools", "hashlib", "inspect"),
    *("itertools", "math", "numbers", "typing", "warnings", "weakref"),
}


def allowed(folder):
    """The transitive closure of the arrows."""
    reached, new = set(), {folder}
    while new:
        reached |= new
        new = set().union(*(ALLOWED[f] for f in new)) - reached
    return reached


def imports(path):
    """`(module, line)` of every import, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def violations(path, folder):
    for module, line in imports(path):
        parts = module.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {module}"
        if not parts[0]:
            yield f"{where}: relative"
        elif parts[:2] == ["keras", "src"]:
            yield f"{where}: private"
        elif parts[0] in FRAMEWORKS:
            if folder != "backend":
                yield f"{where}: only backend/ names frameworks"
        elif parts[0] == "keras_moe":
            target = parts[1] if len(parts) > 1 else None
            if folder is not None and target in ALLOWED:
                if target not in allowed(folder):
                    yield f"{where}: an arrow that points up"
        elif parts[0] not in EVERYWHERE:
            yield f"{where}: a dependency nobody decided on"


class ArchitectureTest(unittest.TestCase):
    def test_imports(self):
        files = sorted(ROOT.rglob("*.py"))
        self.assertGreater(len(files), 25)
        found = []
        for path in files:
            folder = path.relative_to(ROOT).parts[0]
            folder = None if folder.endswith(".py") else folder
            if folder is not None:
                self.assertIn(folder, ALLOWED)
            found += violations(path, folder)
        self.assertEqual(found, [])

    def test_this_test_finds_violations(self):
        source = (
            "from keras.src import ops\nimport torch\nimport pandas\n"
            "from keras_moe.layers import MoE\nfrom . import x\n"
        )
        path = ROOT / "routers" / "imagined.py"

        class Imagined(type(path)):
            def read_text(self):
                return source

        found = "\n".join(violations(Imagined(path), "routers"))
        for word in ("private", "frameworks", "decided", "up", "relative"):
            self.assertIn(word, found)

    def test_size(self):
        for path in ROOT.rglob("*.py"):
            lines = len(path.read_text().splitlines())
            self.assertLessEqual(lines, 400, path)
