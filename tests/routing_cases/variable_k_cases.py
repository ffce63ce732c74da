import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "routing"


def cases_of(family):
    """`(name, config, arrays)` of every recorded case of a family's module."""
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        config = json.loads(path.read_text())["config"]
        with np.load(path.with_suffix(".npz")) as file:
            arrays = {key: file[key] for key in file.files}
        if family.matches(config, arrays):
            found.append((path.stem, config, arrays))
    if not found:
        raise AssertionError(f"no case for {family.__name__} in {FOLDER}")
    return found
