"""The vision models among those of keras-hub, by keras-hub's own tests.

What keras-hub's routines do is not public: they are run as they are, in a
process of their own, since registering changes what Keras loads.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import unittest

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[3]

MISSING = [
    name
    for name in ("keras_hub", "grain", "tensorflow")
    if importlib.util.find_spec(name) is None
]


@pytest.mark.skipif(
    bool(MISSING), reason=f"keras-hub's routines import {', '.join(MISSING)}."
)
class KerasHubTest(unittest.TestCase):
    def test_routines_of_keras_hub(self):
        done = subprocess.run(
            [sys.executable, "-m", "tests.vision.models.keras_hub_routines"],
            env={**os.environ, "KERAS_BACKEND": keras.config.backend()},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=900,
        )
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertRegex(done.stderr, r"Ran \d\d? tests")
