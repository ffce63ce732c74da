"""Shared experts of recorded blocks."""

import numpy as np

from keras_moe import experts as experts_lib
from tests.blocks.activations import activation
from tests.blocks.refuse import refuse


class SharedExpertsReader:
    """The part of `Reader` that makes experts for all tokens."""

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
                activation(spec),
                lambda w: w[up].T[None],
                lambda w: w[down].T[None],
            )
        elif kind in ("glu", "glu_fused"):
            bank = self._shared_glu(spec)
        else:
            refuse({"shared kind": kind})
        self.moe["shared_experts"] = bank
        refuse(spec)

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
            1, width, name="shared", **activation(spec)
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
            count, width, name="always", **activation(shared)
        )
        refuse(shared)
        return self._mixed([routed, always], "experts", "always")
