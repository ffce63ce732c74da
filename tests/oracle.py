"""Public layers from recorded cases of other people's code.

All helpers read what is recorded with a case, never its name, so that they
take cases of the same families that are not in `tests/data`.
"""

import importlib
import pkgutil

from tests import recommendation_cases
from tests import routing_cases
from tests.blocks import moe_from_spec as moe_from_spec
from tests.recommendation_cases.recorded import Recorded
from tests.recommendation_cases.recorded import Trunk


def router_from_case(config, arrays):
    """The public router, or layer, of a case of `tests/data/routing`.

    Args:
        config: dict. The `config` of the case's JSON.
        arrays: dict of the case's arrays.

    Returns:
        A built router, or the layer that stands for one, with the weights of
        the case.
    """
    for family in families():
        if family.matches(config, arrays):
            return family.router_from_case(config, arrays)
    raise NotImplementedError(f"No family takes the case with {config}")


def trunk_from_case(config, arrays):
    """A model of public layers, of a case of `tests/data/recommendation`.

    Args:
        config: The JSON of the case, or its `config`.
        arrays: dict of the case's arrays.

    Returns:
        A `keras.Model` with the weights of the case. It is called with a dict
        of the arrays under `in/` by name, and gives a dict of what is recorded
        under `out/`. Its `recorded_gradients(by_path)` turns the gradients
        of its variables, by their path, into gradients of the recorded weights.
    """
    if isinstance(config, dict) and "config" in config:
        config = config["config"]
    found = recommendation_families(config, arrays)
    if not found:
        raise NotImplementedError(f"No family takes the case with {config}")
    recorded = Recorded(arrays)
    outputs = found[0].outputs(config, recorded)
    trunk = Trunk(inputs=recorded.inputs, outputs=outputs)
    trunk.recorded = recorded
    return trunk


def recommendation_families(config, arrays):
    """The modules of `tests/recommendation_cases` that take a case."""
    recorded = Recorded(arrays)
    return [
        family
        for family in _modules(recommendation_cases)
        if hasattr(family, "matches") and family.matches(config, recorded)
    ]


def families():
    """The modules of `tests/routing_cases` that know a source's cases."""
    return [m for m in _modules(routing_cases) if hasattr(m, "matches")]


def _modules(package):
    return [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.endswith("_test")
    ]
