"""Reads a recorded block, piece by piece."""

import keras_moe
from tests.blocks.experts import ExpertsReader
from tests.blocks.refuse import refuse
from tests.blocks.routers import RouterReader
from tests.blocks.shared_experts import SharedExpertsReader


class Reader(RouterReader, ExpertsReader, SharedExpertsReader):
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
        refuse(spec)
        return keras_moe.layers.MoE(**{**self.moe, **kwargs})
