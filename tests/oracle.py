"""Builds a public layer from the recorded semantics of somebody else's block.

`moe_from_spec(spec, weights)` reads the JSON `spec` of a recorded block and the
weights under their names in HF transformers, and returns a built
`keras_moe.layers.MoE`, with a map from those names to its variables. It knows
the fields of the block families that the library can do so far, and refuses
any other by name.
"""

import json
import pathlib

import numpy as np

import keras_moe

BLOCKS = pathlib.Path(__file__).parent / "data" / "blocks"

_ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu": "gelu"}


def cases():
    return sorted(path.stem for path in BLOCKS.glob("*.json"))


def load(case):
    """`(spec, arrays)` of a recorded block."""
    spec = json.loads((BLOCKS / f"{case}.json").read_text())["spec"]
    with np.load(BLOCKS / f"{case}.npz") as arrays:
        return spec, dict(arrays)


def weights_of(arrays):
    return {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}


def moe_from_spec(spec, weights, **kwargs):
    """Returns `(layer, imports)`.

    `imports` maps the path of each trainable variable below the layer to a
    function that takes arrays by transformers' names, weights or gradients,
    and returns the array of that variable.
    """
    spec = {k: v for k, v in spec.items() if v is not None}
    imports = {}
    router, num_experts = _router(dict(spec.pop("router")), weights, imports)
    dim, experts = _experts(
        dict(spec.pop("experts")), weights, num_experts, imports
    )
    shared, gated = _shared(dict(spec.pop("shared", {})), weights, imports)
    _refuse(spec)
    layer = keras_moe.layers.MoE(
        router=router,
        experts=experts,
        shared_experts=shared,
        shared_experts_gate=gated,
        **kwargs,
    )
    layer.build((None, dim))
    assign(layer, imports, weights)
    return layer, imports


def assign(layer, imports, weights):
    paths = [v.path.split("/", 1)[1] for v in layer.trainable_variables]
    if sorted(paths) != sorted(imports):
        raise ValueError(f"{sorted(paths)} are not {sorted(imports)}")
    for path, variable in zip(paths, layer.trainable_variables, strict=True):
        variable.assign(imports[path](weights))


def _refuse(rest):
    if rest:
        raise NotImplementedError(f"The library cannot do: {rest}")


def _router(spec, weights, imports):
    score = spec.pop("score")
    after = spec.pop("score_topk", None)
    spec.pop("select_on")  # scores rise with their logits
    norm = spec.pop("norm", "none")
    if norm not in ("none", "sum") or (score == "logit" and after is None):
        _refuse({"norm": norm, "score": score})
    name = spec.pop("weight")
    router = keras_moe.routers.TopKRouter(
        num_experts=weights[name].shape[0],
        top_k=spec.pop("k"),
        score_activation=after or score,
        score_after_selection=after is not None,
        normalize_weights=norm == "sum",
        normalize_epsilon=spec.pop("norm_eps", 0.0),
        weight_scale=spec.pop("scale", 1.0),
        use_bias="bias" in spec,
        name="router",
    )
    imports["router/kernel"] = lambda w: w[name].T
    if "bias" in spec:
        bias = spec.pop("bias")
        imports["router/bias"] = lambda w: w[bias]
    _refuse(spec)
    return router, router.num_experts


def _experts(spec, weights, num_experts, imports):
    gate_up, down = spec.pop("gate_up"), spec.pop("down")
    transposed = spec.pop("transposed", False)
    activation = _ACTIVATIONS[spec.pop("act")]
    if spec.pop("layout") != "concat":
        _refuse({"layout": "not concat"})
    _refuse(spec)

    def matrices(w, name):  # (E, in, out)
        return w[name] if transposed else np.swapaxes(w[name], 1, 2)

    def half(w, index):
        return np.split(matrices(w, gate_up), 2, axis=-1)[index]

    imports["experts/gate_kernel"] = lambda w: half(w, 0)
    imports["experts/up_kernel"] = lambda w: half(w, 1)
    imports["experts/down_kernel"] = lambda w: matrices(w, down)
    _, intermediate_dim, dim = matrices(weights, down).shape
    return dim, keras_moe.experts.GLUExperts(
        num_experts, intermediate_dim, activation, name="experts"
    )


def _shared(spec, weights, imports):
    if not spec:
        return None, False
    if spec.pop("kind") != "glu":
        _refuse({"kind": "not glu"})
    activation = _ACTIVATIONS[spec.pop("act")]
    width = weights[spec["gate"]].shape[0]
    for part in ("gate", "up", "down"):
        name = spec.pop(part)
        imports[f"shared/{part}_kernel"] = lambda w, name=name: w[name].T[None]
    gated = "out_gate" in spec
    if gated:
        gate = spec.pop("out_gate")
        imports["shared_gate_kernel"] = lambda w: w[gate].T
    _refuse(spec)
    experts = keras_moe.experts.GLUExperts(1, width, activation, name="shared")
    return experts, gated
