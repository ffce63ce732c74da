"""The recorded vision models."""

import json
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

DATA = pathlib.Path(__file__).parents[1] / "data" / "vision"


class Case(NamedTuple):
    name: str
    meta: dict
    arrays: Any

    @property
    def config(self):
        return self.meta["config"]

    def under(self, prefix):
        """The arrays whose names begin so, by the rest of their names."""
        return {
            name.removeprefix(prefix): value
            for name, value in self.arrays.items()
            if name.startswith(prefix)
        }


def named(matches):
    """`(name, case)` of each case that `matches(meta, arrays)` takes."""
    found = []
    for path in sorted(DATA.glob("*.json")):
        meta = json.loads(path.read_text())
        with np.load(path.with_suffix(".npz")) as file:
            if matches(meta, file):
                found.append((path.stem, Case(path.stem, meta, dict(file))))
    if not found:
        raise ValueError(f"No recorded case in {DATA}")
    return found
