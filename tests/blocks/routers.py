"""Routers of recorded blocks."""

import math

import numpy as np

import keras_moe
from keras_moe import routers as routers_lib
from tests.blocks.activations import exact_gelu
from tests.blocks.refuse import refuse

_SCORES = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "sqrtsoftplus": "sqrt_softplus",
}


class RouterReader:
    """The part of `Reader` that makes routers."""

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
            refuse({"router kind": kind})
        router = read[kind](spec, dim)
        refuse(spec)
        return router

    def _kernel(self, spec, path="router/kernel"):
        """Imports the matrix; returns the number of its experts."""
        name = spec.pop("weight")
        self.imports[path] = lambda w: w[name].T
        return self.weights[name].shape[0]

    def _bias(self, name):
        """Imports the bias of the logits; whether there is one."""
        if name is None:
            return False
        self.imports["router/bias"] = lambda w: w[name]
        return True

    def _bias_beside_weight(self, spec):
        """The same, where it may stand beside the kernel without being told."""
        name = self.spec["router"]["weight"].replace("weight", "bias")
        return self._bias(
            spec.pop("bias", name if name in self.weights else None)
        )

    def _scores(self, spec):
        """What scores and weights are made of."""
        score, after = spec.pop("score"), spec.pop("score_topk", None)
        if after is None and score == "logit":
            refuse({"score": score})
        norm = spec.pop("norm", "none")
        if norm not in ("none", "sum", "sum_clamp", "lp"):
            refuse({"norm": norm})
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
        kwargs["use_bias"] = self._bias(spec.pop("bias", None))
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
            refuse({"score_topk": after, "tables": len(tables)})
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
        return routers_lib.TopKRouter(
            num_experts,
            spec.pop("k"),
            use_bias=self._bias_beside_weight(spec),
            name="router",
        )

    def _nllb_router(self, spec, dim):
        num_experts = self._kernel(spec)
        before = spec.pop("norm_before_drop")
        self.moe["capacity"] = keras_moe.layers.Capacity(
            size=spec.pop("capacity"),
            drop_policy="priority" if spec.pop("bpr") else "position",
            normalize_kept_weights=not before,
        )
        return routers_lib.GShardRouter(
            num_experts,
            spec.pop("k"),
            normalize_weights=before,
            use_bias=self._bias_beside_weight(spec),
            name="router",
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
