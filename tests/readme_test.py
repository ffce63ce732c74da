"""The README's Python runs, and what the pages say and link to is there."""

import math
import os
import pathlib
import re
import tempfile
import unittest

import keras_moe

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (
    README,
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "tests" / "data" / "README.md",
    *sorted((ROOT / "guides").glob("*.md")),
)


def run_blocks(page):
    """Runs the Python blocks of a page; returns their namespaces and files."""
    blocks = re.findall(
        r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL
    )
    namespaces = []
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in blocks:
                namespaces.append({})
                exec(compile(block, str(page), "exec"), namespaces[-1])
            return namespaces, os.listdir()
        finally:
            os.chdir(before)


def anchors(page):
    """What links to the headings of a page, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


def broken_links(page, text):
    """The relative links of a page's text that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


def size_of_kernels(layer):
    return sum(
        math.prod(variable.shape)
        for variable in layer.weights
        if "kernel" in variable.name
    )


class ReadmeTest(unittest.TestCase):
    def test_blocks(self):
        namespaces, files = run_blocks(README)
        self.assertGreaterEqual(len(namespaces), 2)
        self.assertEqual(files, ["model.keras"])
        # Two dense layers, and experts that multiply as much for a token.
        blocks = namespaces[1]
        d = blocks["d"]
        for name in ("dense", "mlp", "glu"):
            blocks[name].build((None, d))
        count = {"dense": size_of_kernels(blocks["dense"])}
        for name in ("mlp", "glu"):
            experts = blocks[name].experts
            top_k = blocks[name].router.top_k
            weights = size_of_kernels(experts)
            self.assertEqual(weights, 4 * count["dense"])
            count[name] = weights * top_k // experts.num_experts
        self.assertEqual(count, dict.fromkeys(count, 8 * d**2))

    def test_length(self):
        lines = README.read_text("utf-8").splitlines()
        self.assertLessEqual(len(lines), 160)

    def test_links(self):
        for page in PAGES:
            broken = list(broken_links(page, page.read_text("utf-8")))
            self.assertEqual(broken, [], page)

    def test_this_test_finds_broken_links(self):
        text = "[a](nowhere.md) [b](#nothing) ![c](README.md) [d](#install)"
        found = list(broken_links(README, text))
        self.assertEqual(found, ["nowhere.md", "#nothing"])

    def test_every_part_is_named(self):
        pages = [page for page in PAGES if page.stem != "CHANGELOG"]
        text = "\n".join(page.read_text("utf-8") for page in pages)
        for room, base in (
            (keras_moe.routers, keras_moe.routers.Router),
            (keras_moe.experts, keras_moe.experts.Experts),
            (keras_moe.losses, keras_moe.losses.RoutingLoss),
            (keras_moe.models, keras_moe.models.MultiTaskModel),
        ):
            for name, value in vars(room).items():
                if isinstance(value, type) and issubclass(value, base):
                    self.assertIn(f"`{name}`", text)

    def test_every_room_is_named(self):
        text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
        rooms = [
            path.parent
            for folder in ("", "recommendation")
            for path in (ROOT / "keras_moe" / folder).glob("*/__init__.py")
        ]
        self.assertGreater(len(rooms), 15)
        for room in rooms:
            self.assertIn(f"`{room.name}/`", text)
        # And the other way round.
        for path in re.findall(r"`([\w/]+\.py|\w+/)`", text):
            found = [
                folder / path
                for folder in (
                    ROOT,
                    ROOT / "keras_moe",
                    ROOT / "keras_moe" / "recommendation",
                )
                if (folder / path).exists()
            ]
            self.assertTrue(found, path)
