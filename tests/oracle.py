"""Public layers from recorded cases of other people's code.

Both helpers read what is recorded with a case, never its name, so that they
take cases of the same families that are not in `tests/data`.
"""

import importlib
import pkgutil

from tests import routing_cases
from tests.blocks import moe_from_spec as moe_from_spec


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


def families():
    """The modules of `tests/routing_cases` that know a source's cases."""
    modules = [
        importlib.import_module(f"tests.routing_cases.{module.name}")
        for module in pkgutil.iter_modules(routing_cases.__path__)
        if not module.name.endswith("_test")
    ]
    return [module for module in modules if hasattr(module, "matches")]
