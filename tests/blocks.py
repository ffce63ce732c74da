"""Builds a public layer from the recorded semantics of somebody else's block.

`moe_from_spec(spec, weights)` reads the JSON `spec` of a recorded block and the
weights under their names in HF transformers, and returns a built
`keras_moe.layers.MoE` with these weights. `imports(spec, weights)` maps the
path of each variable of that layer to a function from weights by
transformers' names, or their gradients, to an array of the variable's shape.
Fields it does not know it refuses by name.
"""

import json
import math
import pathlib

import keras
import numpy as np

import keras_moe
from keras_moe import experts as experts_lib
from keras_moe import routers as routers_lib

DATA = pathlib.Path(__file__).parent / "data" / "blocks"

_SCORES = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "sqrtsoftplus": "sqrt_softplus",
}


class AddBias(keras.layers.Layer):
    """A user's own layer: JetMoE adds one bias behind all experts."""

    def build(self, shape):
        self.bias = self.add_weight(name="bias", shape=(shape[-1],))

    def call(self, x):
        return x + self.bias

    def compute_output_shape(self, shape):
        return shape


def exact_gelu(x):
    return keras.activations.gelu(x, approximate=False)


_ACTIVATIONS = {
    "silu": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
    "gelu": exact_gelu,
    "gelu_tanh": lambda x: keras.activations.gelu(x, approximate=True),
}


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


class Reader:
    def __init__(self, spec, weights):
        self.spec = {
            part: {k: v for k, v in fields.items() if v is not None}
            for part, fields in spec.items()
            if fields
        }
        self.weights = weights
        self.imports = {}
        self.moe = {}

    def layer(self, **kwargs):
        router = dict(self.spec["router"])
        dim = self._dim(router)
        router = self._router(router, dim)
        return self.layer_with(router, **kwargs), dim, self.imports

    def layer_with(self, router, **kwargs):
        spec = dict(self.spec)
        spec.pop("router")
        experts = dict(spec.pop("experts"))
        shared = dict(spec.pop("shared", {}))
        self.moe["router"] = router
        if shared.get("kind") == "inkling":
            bank = self._routed_and_shared(experts, shared)
        else:
            bank = self._experts(experts)
            self._shared(shared)
        self.moe["experts"] = self._filled_up(bank)
        _refuse(spec)
        return keras_moe.layers.MoE(**{**self.moe, **kwargs})

    # Routers.

    def _dim(self, router):
        name = router.get("weight", "gate.down_proj.weight")
        return self.weights[name].shape[1]

    def _router(self, spec, dim):
        kind = spec.pop("kind", "topk")
        read = {
            "topk": self._top_k_router,
            "hash": self._hash_router,
            "switch": self._switch_router,
            "nllb": self._nllb_router,
            "sparsemixer": self._sparse_mixer_router,
            "inkling": self._inkling_router,
            "zaya": self._zaya_router,
        }
        if kind not in read:
            _refuse({"router kind": kind})
        router = read[kind](spec, dim)
        _refuse(spec)
        return router

    def _kernel(self, spec, path="router/kernel"):
        """Imports the matrix; returns the number of its experts."""
        name = spec.pop("weight")
        self.imports[path] = lambda w: w[name].T
        return self.weights[name].shape[0]

    def _scores(self, spec):
        """What scores and weights are made of."""
        score, after = spec.pop("score"), spec.pop("score_topk", None)
        if after is None and score == "logit":
            _refuse({"score": score})
        norm = spec.pop("norm", "none")
        if norm not in ("none", "sum", "sum_clamp", "lp"):
            _refuse({"norm": norm})
        kwargs = {
            "score_activation": _SCORES[after or score],
            "normalize_weights": norm != "none",
            # Below it, a sum is at its lower bound; added, it is as small.
            "normalize_epsilon": spec.pop("norm_eps", 0.0),
            "weight_scale": spec.pop("scale", 1.0),
        }
        order = spec.pop("norm_p", 1)
        if norm == "lp":
            kwargs["normalize_order"] = order
        return kwargs, after is not None

    def _top_k_router(self, spec, dim):
        num_experts = self._kernel(spec)
        kwargs, after = self._scores(spec)
        select_on = spec.pop("select_on")
        if "select_bias" in spec:
            bias = spec.pop("select_bias")
            self.imports["router/expert_bias"] = lambda w: w[bias].reshape(-1)
            by_logit = select_on == "logit" and not after
            kwargs["expert_bias"] = "logits" if by_logit else "scores"
        if spec.pop("bias", None):
            kwargs["use_bias"] = True
            name = self.spec["router"]["bias"]
            self.imports["router/bias"] = lambda w: w[name]
        if spec.get("n_group", 1) > 1:
            kwargs["num_expert_groups"] = spec["n_group"]
            kwargs["top_k_groups"] = spec["topk_group"]
            best = {"max": 1, "top2sum": 2}
            kwargs["group_score"] = best[spec["group_score"]]
        for key in ("n_group", "topk_group", "group_score"):
            spec.pop(key, None)
        kwargs["temperature"] = 1 / spec.pop("logit_mult", 1.0)
        kwargs["logit_softcap"] = spec.pop("softcap", None) or None
        if spec.pop("pre", None):  # gemma4, the only one
            scale = spec.pop("scale_param")
            kwargs["normalize_inputs"] = True
            kwargs["normalize_inputs_epsilon"] = spec.pop("rms_eps")
            kwargs["temperature"] *= math.sqrt(dim)
            self.imports["router/input_scale"] = lambda w: w[scale]
        if "per_expert_scale" in spec:
            per_expert = spec.pop("per_expert_scale")
            kwargs["learned_scale"] = "expert"
            self.imports["router/scale"] = lambda w: w[per_expert]
        return routers_lib.TopKRouter(
            num_experts,
            spec.pop("k"),
            score_after_selection=after,
            name="router",
            **kwargs,
        )

    def _hash_router(self, spec, dim):
        num_experts = self._kernel(spec)
        kwargs, after = self._scores(spec)
        spec.pop("select_on"), spec.pop("k")
        tables = [w for name, w in self.weights.items() if "tid2eid" in name]
        if after or len(tables) != 1:
            _refuse({"score_topk": after, "tables": len(tables)})
        return routers_lib.HashRouter(
            num_experts,
            table=tables[0],
            weights="learned",
            name="router",
            **kwargs,
        )

    def _switch_router(self, spec, dim):
        num_experts = self._kernel(spec)
        self.moe["capacity"] = keras_moe.layers.Capacity(
            size=spec.pop("capacity"), per="sequence"
        )
        return routers_lib.TopKRouter(num_experts, spec.pop("k"), name="router")

    def _nllb_router(self, spec, dim):
        num_experts = self._kernel(spec)
        before = spec.pop("norm_before_drop")
        self.moe["capacity"] = keras_moe.layers.Capacity(
            size=spec.pop("capacity"),
            drop_policy="priority" if spec.pop("bpr") else "position",
            normalize_kept_weights=not before,
        )
        return routers_lib.GShardRouter(
            num_experts, spec.pop("k"), normalize_weights=before, name="router"
        )

    def _sparse_mixer_router(self, spec, dim):
        num_experts = self._kernel(spec)
        return routers_lib.SparseMixerRouter(
            num_experts,
            spec.pop("k"),
            jitter_epsilon=spec.pop("jitter_eps"),
            name="router",
        )

    def _inkling_router(self, spec, dim):
        num_shared = spec.pop("n_shared")
        num_experts = self._kernel(spec)
        bias, scale = spec.pop("select_bias"), spec.pop("scale_param")
        self.imports["router/expert_bias"] = lambda w: np.pad(
            w[bias], (0, num_shared)
        )
        self.imports["router/scale"] = lambda w: w[scale]
        return routers_lib.TopKRouter(
            num_experts,
            spec.pop("k"),
            score_activation="sigmoid",
            expert_bias=True,
            num_always_on=num_shared,
            learned_scale="global",
            weight_scale=spec.pop("scale"),
            name="router",
        )

    def _zaya_router(self, spec, dim):
        weights, hidden = self.weights, "gate.router_mlp."
        for path, name in (
            ("projection_kernel", "gate.down_proj.weight"),
            ("hidden_kernel_0", f"{hidden}fc1.weight"),
            ("hidden_kernel_1", f"{hidden}fc2.weight"),
            ("kernel", f"{hidden}out_proj.weight"),
        ):
            self.imports[f"router/{path}"] = lambda w, name=name: w[name].T
        for path, name in (
            ("projection_bias", "gate.down_proj.bias"),
            ("context_scale", "gate.router_states_scale"),
            ("projection_scale", f"{hidden}norm.weight"),
            ("hidden_bias_0", f"{hidden}fc1.bias"),
            ("hidden_bias_1", f"{hidden}fc2.bias"),
            ("expert_bias", "gate.balancing_biases"),
        ):
            self.imports[f"router/{path}"] = lambda w, name=name: w[name]
        return routers_lib.MLPRouter(
            weights[f"{hidden}out_proj.weight"].shape[0],
            spec.pop("k"),
            hidden_dims=[
                len(weights[f"{hidden}{name}.bias"]) for name in ("fc1", "fc2")
            ],
            activation=exact_gelu,
            projection_dim=len(weights["gate.down_proj.bias"]),
            normalize_projection=True,
            normalize_projection_epsilon=spec.pop("rms_eps"),
            residual="projection",
            normalize_weights=False,
            expert_bias=True,
            zero_weight_experts=1,
            name="router",
        )

    # Experts.

    def _experts(self, spec, name="experts"):
        read = {
            "concat": self._glu_experts,
            "interleaved": self._glu_experts,
            "up_only": self._up_only_experts,
            "linear_pair": self._linear_pair_experts,
            "dbrx": self._dbrx_experts,
            "peer": self._peer_experts,
            "moa": self._moa_experts,
        }
        layout = spec.pop("layout")
        if layout not in read:
            _refuse({"layout": layout})
        if spec.pop("apply", "output") == "input":
            self.moe["weights_on"] = "input"
        self._around(spec)
        bank = read[layout](spec, name, layout)
        _refuse(spec)
        return bank

    def _around(self, spec):
        """What comes before and behind the experts."""
        before, behind = [], []
        if "pre_proj" in spec:
            self._dense(before, "pre_projection", spec.pop("pre_proj"))
        norm = spec.pop("pre_norm", None) or spec.pop("pre_norm_only", None)
        epsilon = spec.pop("pre_norm_eps", None)
        shift = 1.0 if spec.pop("pre_norm_centered", False) else 0.0
        if norm:
            before.append(
                keras.layers.RMSNormalization(epsilon=epsilon, name="pre_norm")
            )
            self.imports["pre/pre_norm/scale"] = lambda w: shift + w[norm]
        scale = spec.pop("out_scale", 1.0)
        if scale != 1.0:
            behind.append(keras.layers.Rescaling(scale))
        if "post_proj" in spec:
            self._dense(behind, "post_projection", spec.pop("post_proj"))
        if "out_bias" in spec:
            bias = spec.pop("out_bias")
            behind.append(AddBias(name="out_bias"))
            self.imports["post/out_bias/bias"] = lambda w: w[bias]
        if before:
            self.moe["pre_experts"] = keras.Sequential(before, name="pre")
        if behind:
            self.moe["post_experts"] = keras.Sequential(behind, name="post")

    def _dense(self, layers, name, weight):
        units = self.weights[weight].shape[0]
        layers.append(keras.layers.Dense(units, use_bias=False, name=name))
        side = name.split("_")[0]
        self.imports[f"{side}/{name}/kernel"] = lambda w: w[weight].T

    def _glu_experts(self, spec, name, layout):
        gate_up, down = spec.pop("gate_up"), spec.pop("down")
        biases = spec.pop("gate_up_bias", None), spec.pop("down_bias", None)
        transposed = spec.pop("transposed", False)
        # Beyond the rows of the second matrix there are copying experts.
        count = len(self.weights[down])

        def matrices(w, key):  # (E, in, out)
            w = w[key][:count]
            return w if transposed else np.swapaxes(w, 1, 2)

        def half(array, index):
            if layout == "interleaved":
                return array[..., index::2]
            return np.split(array, 2, axis=-1)[index]

        for index, part in enumerate(("gate", "up")):
            self.imports[f"{name}/{part}_kernel"] = lambda w, i=index: half(
                matrices(w, gate_up), i
            )
            if biases[0]:
                self.imports[f"{name}/{part}_bias"] = lambda w, i=index: half(
                    w[biases[0]][:count], i
                )
        self.imports[f"{name}/down_kernel"] = lambda w: matrices(w, down)
        if biases[1]:
            self.imports[f"{name}/down_bias"] = lambda w: w[biases[1]]
        if bool(biases[0]) != bool(biases[1]):
            _refuse({"biases": biases})
        return experts_lib.GLUExperts(
            count,
            matrices(self.weights, down).shape[1],
            use_bias=bool(biases[0]),
            name=name,
            **_activation(spec),
        )

    def _mlp_experts(self, name, act, up, down, bias=None):
        """`up` and `down` take weights to (E, D, F) and (E, F, D)."""
        self.imports[f"{name}/up_kernel"] = up
        self.imports[f"{name}/down_kernel"] = down
        if bias is not None:
            self.imports[f"{name}/up_bias"] = bias[0]
            self.imports[f"{name}/down_bias"] = bias[1]
        count, _, width = up(self.weights).shape
        return experts_lib.MLPExperts(
            count, width, use_bias=bias is not None, name=name, **act
        )

    def _up_only_experts(self, spec, name, layout):
        up, down = spec.pop("up"), spec.pop("down")
        return self._mlp_experts(
            name,
            _activation(spec),
            lambda w: np.swapaxes(w[up], 1, 2),
            lambda w: np.swapaxes(w[down], 1, 2),
        )

    def _linear_pair_experts(self, spec, name, layout):
        names = spec.pop("fc1"), spec.pop("fc2")
        count = self.moe["router"].num_experts

        def stacked(w, pattern):
            return np.stack([w[pattern.format(e)] for e in range(count)])

        def bias(pattern):
            pattern = pattern.replace("weight", "bias")
            return lambda w: stacked(w, pattern)

        kernels = [
            lambda w, p=pattern: np.swapaxes(stacked(w, p), 1, 2)
            for pattern in names
        ]
        first_bias = names[0].replace("weight", "bias").format(0)
        has_bias = first_bias in self.weights
        return self._mlp_experts(
            name,
            _activation(spec),
            *kernels,
            [bias(pattern) for pattern in names] if has_bias else None,
        )

    def _dbrx_experts(self, spec, name, layout):
        width = spec.pop("ffn")

        def banks(w, part):  # (E, F, D)
            matrix = w[f"experts.mlp.{part}"]
            return matrix.reshape(-1, width, matrix.shape[-1])

        for path, part in (("gate", "w1"), ("up", "v1")):
            self.imports[f"{name}/{path}_kernel"] = lambda w, part=part: (
                np.swapaxes(banks(w, part), 1, 2)
            )
        self.imports[f"{name}/down_kernel"] = lambda w: banks(w, "w2")
        return experts_lib.GLUExperts(
            len(banks(self.weights, "w2")),
            width,
            name=name,
            **_activation(spec),
        )

    def _peer_experts(self, spec, name, layout):
        return self._mlp_experts(
            name,
            _activation(spec),
            lambda w: w["down_embed.weight"][:, :, None],
            lambda w: w["up_embed.weight"][:, None, :],
        )

    def _moa_experts(self, spec, name, layout):
        return self._mlp_experts(
            name,
            {"activation": "linear"},
            lambda w: np.swapaxes(w["input_linear.weight"], 1, 2),
            lambda w: np.swapaxes(w["output_linear.weight"], 1, 2),
        )

    def _filled_up(self, bank):
        """The bank, and what the router's further experts stand for."""
        missing = self.moe["router"].num_experts - bank.num_experts
        if not missing:
            return bank
        # Zaya's last class is a skip, LongCat's last experts copy.
        zaya = self.spec["router"].get("kind") == "zaya"
        more = experts_lib.ZeroExperts if zaya else experts_lib.CopyExperts
        return self._mixed([bank, more(missing, name="more")], bank.name)

    def _mixed(self, banks, *prefixes):
        for path in [p for p in self.imports if p.startswith(prefixes)]:
            self.imports[f"mixed/{path}"] = self.imports.pop(path)
        return experts_lib.MixedExperts(banks, name="mixed")

    # Shared experts.

    def _shared(self, spec):
        if not spec:
            return
        kind = spec.pop("kind")
        if spec.pop("average", False):
            self.moe["shared_experts_mode"] = "average"
        if "out_gate" in spec:
            gate = spec.pop("out_gate")
            self.moe["shared_experts_mode"] = "gate"
            self.imports["shared_gate_kernel"] = lambda w: w[gate].T
        if kind == "up_only":
            up, down = spec.pop("up"), spec.pop("down")
            bank = self._mlp_experts(
                "shared",
                _activation(spec),
                lambda w: w[up].T[None],
                lambda w: w[down].T[None],
            )
        elif kind in ("glu", "glu_fused"):
            bank = self._shared_glu(spec)
        else:
            _refuse({"shared kind": kind})
        self.moe["shared_experts"] = bank
        _refuse(spec)

    def _shared_glu(self, spec):
        down = spec.pop("down")
        if "gate_up" in spec:
            fused = spec.pop("gate_up")
            parts = [
                lambda w, i=i: np.split(w[fused], 2)[i].T[None] for i in (0, 1)
            ]
        else:
            names = spec.pop("gate"), spec.pop("up")
            parts = [lambda w, name=name: w[name].T[None] for name in names]
        self.imports["shared/gate_kernel"] = parts[0]
        self.imports["shared/up_kernel"] = parts[1]
        self.imports["shared/down_kernel"] = lambda w: w[down].T[None]
        width = self.weights[down].shape[1]
        return experts_lib.GLUExperts(
            1, width, name="shared", **_activation(spec)
        )

    def _routed_and_shared(self, experts, shared):
        """Experts that are always chosen, for shares of their own."""
        routed = self._experts(experts)
        shared.pop("kind")
        for part in ("gate", "up", "down"):
            self.imports[f"always/{part}_kernel"] = lambda w, part=part: (
                np.swapaxes(w[f"shared_experts.{part}_proj"], 1, 2)
            )
        count, _, width = self.weights["shared_experts.down_proj"].shape
        always = experts_lib.GLUExperts(
            count, width, name="always", **_activation(shared)
        )
        _refuse(shared)
        return self._mixed([routed, always], "experts", "always")


def _activation(spec):
    name = spec.pop("act")
    limit, alpha = spec.pop("limit", None), spec.pop("alpha", None)
    if name == "swiglu_oai":
        kwargs = {"activation": experts_lib.Swish(alpha), "up_shift": 1.0}
    else:
        kwargs = {"activation": _ACTIVATIONS[name]}
    return kwargs | ({} if limit is None else {"limit": limit})


def _refuse(rest):
    if rest:
        raise NotImplementedError(f"Nobody has read this yet: {rest}")
