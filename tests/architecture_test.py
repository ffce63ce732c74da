"""Who may import whom: reads the imports of every file of the library."""

import ast
import pathlib
import unittest

import keras_moe

ROOT = pathlib.Path(keras_moe.__file__).parent
# From the ground up: a room may import all rooms of the floors below its own,
# and the rooms of its own floor that stand here beside it.
FLOORS = (
    {"backend": set(), "checks": set()},
    {"ops": set(), "stacked": {"ops"}},
    {"dispatch": set(), "routers": set(), "experts": set(), "losses": set()},
    {"moe": {"distribution"}, "distribution": set()},
    {"recommendation": set(), "vision": set(), "language": set()},
    {"analysis": set(), "conversion": set()},
    {"layers": set(), "models": set(), "metrics": set(), "callbacks": set()},
)
FACES = set(FLOORS[-1])
FRAMEWORKS = {"jax", "jaxlib", "tensorflow", "torch"}
EVERYWHERE = {
    *("keras", "numpy"),
    *("contextlib", "datetime", "fractions", "functools", "hashlib"),
    *(
        "importlib",
        "inspect",
        "itertools",
        "json",
        "math",
        "numbers",
        "os",
        "random",
        "re",
    ),
    *("shutil", "sys", "threading", "types", "typing", "warnings", "weakref"),
    "zipfile",
    # An extra: public_names_test.py sees that only a function imports it.
    "keras_hub",
}


def allowed(room):
    """The rooms that a room may import, besides itself."""
    below = set()
    for floor in FLOORS:
        if room in floor:
            return below | floor[room]
        below |= set(floor)
    raise ValueError(f"There is no room {room}.")


def room_of(path):
    """`"routers"`, `"checks"`; `None` for the top level's own files."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return None if first in ("__init__", "version") else first


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


def violations(path, room):
    for module, line in imports(path):
        parts = module.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {module}"
        if not parts[0]:
            yield f"{where}: relative"
        elif parts[:2] == ["keras", "src"]:
            yield f"{where}: private"
        elif parts[0] in FRAMEWORKS:
            if room != "backend":
                yield f"{where}: only backend/ names frameworks"
        elif parts[0] == "keras_moe":
            target = parts[1] if len(parts) > 1 else None
            if room is None or target in (None, room):
                continue
            if target in FACES:
                yield f"{where}: a face"
            elif target not in allowed(room):
                yield f"{where}: an arrow that points up or across"
        elif parts[0] not in EVERYWHERE:
            yield f"{where}: an undecided dependency"


class ArchitectureTest(unittest.TestCase):
    def test_imports(self):
        files = sorted(ROOT.rglob("*.py"))
        self.assertGreater(len(files), 25)
        rooms = set().union(*FLOORS)
        found = []
        for path in files:
            room = room_of(path)
            if room is not None:
                self.assertIn(room, rooms)
            found += violations(path, room)
        self.assertEqual(found, [])

    def test_faces_only_re_export(self):
        for face in FACES:
            files = list((ROOT / face).rglob("*.py"))
            self.assertEqual(files, [ROOT / face / "__init__.py"])
            for node in ast.parse(files[0].read_text()).body:
                is_docstring = isinstance(node, ast.Expr)
                self.assertTrue(is_docstring or type(node) is ast.ImportFrom)

    def test_rooms(self):
        core = {"backend", "checks", "ops", "stacked"}
        self.assertEqual(allowed("routers"), core)
        self.assertNotIn("vision", allowed("recommendation"))
        self.assertIn("recommendation", allowed("analysis"))

    def test_this_test_finds_violations(self):
        source = (
            "from keras.src import ops\nimport torch\nimport pandas\n"
            "from keras_moe.moe.moe import MoE\nfrom . import x\n"
            "from keras_moe.layers import MoE\n"
            "from keras_moe import experts\n"
        )
        path = ROOT / "routers" / "imagined.py"

        class Imagined(type(path)):
            def read_text(self):
                return source

        found = "\n".join(violations(Imagined(path), "routers"))
        for word in (
            *("private", "frameworks", "undecided", "relative", "a face"),
            *("moe.moe.MoE: an arrow", "experts: an arrow"),
        ):
            self.assertIn(word, found)

    def test_size(self):
        for path in ROOT.rglob("*.py"):
            lines = len(path.read_text().splitlines())
            self.assertLessEqual(lines, 300, path)
