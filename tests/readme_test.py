"""The Python blocks of the README run, each in a namespace of its own."""

import os
import pathlib
import re
import tempfile
import unittest

README = pathlib.Path(__file__).parent.parent / "README.md"


class ReadmeTest(unittest.TestCase):
    def test_blocks(self):
        text = README.read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        self.assertGreaterEqual(len(blocks), 2)
        before = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                for block in blocks:
                    exec(compile(block, str(README), "exec"), {})
                self.assertEqual(os.listdir(), ["model.keras"])
            finally:
                os.chdir(before)
