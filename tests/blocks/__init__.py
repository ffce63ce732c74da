"""Builds a public layer from the recorded semantics of somebody else's block.

`moe_from_spec(spec, weights)` reads the JSON `spec` of a recorded block and the
weights under their names in HF transformers, and returns a built
`keras_moe.layers.MoE` with these weights. `imports(spec, weights)` maps the
path of each variable of that layer to a function from weights by
transformers' names, or their gradients, to an array of the variable's shape.
Fields it does not know it refuses by name.
"""

import json
import pathlib

import numpy as np

from tests.blocks.reader import Reader

DATA = pathlib.Path(__file__).parents[1] / "data" / "blocks"


def cases():
    return sorted(path.stem for path in DATA.glob("*.json"))


def load(case):
    """`(spec, arrays)` of a recorded block."""
    spec = json.loads((DATA / f"{case}.json").read_text())["spec"]
    with np.load(DATA / f"{case}.npz") as arrays:
        return spec, dict(arrays)


def weights_of(arrays):
    return {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}


def context_of(spec, arrays):
    """What `MoE` is called with besides the tokens, or `None`."""
    if spec["router"].get("kind") == "hash":
        return arrays["input_ids"].astype("int32")
    return arrays.get("prev_router_states")


def moe_from_spec(spec, weights, **kwargs):
    layer, dim, imports_ = Reader(spec, weights).layer(**kwargs)
    layer.build((None, dim))
    assign(layer, imports_, weights)
    return layer


def imports(spec, weights):
    return Reader(spec, weights).layer()[-1]


def path_of(variable):
    return variable.path.split("/", 1)[1]


def assign(layer, imports_, weights):
    variables = {path_of(v): v for v in layer.variables}
    trainable = {path_of(v) for v in layer.trainable_variables}
    if not trainable <= set(imports_) <= set(variables):
        raise ValueError(f"{sorted(trainable)} are not {sorted(imports_)}")
    for path, array in imports_.items():
        variables[path].assign(array(weights))
