"""Balanced assignment of fairseq's BASE layers."""

import numpy as np

from keras_moe.routers.base_router import BASERouter


def matches(config, arrays):
    return {"scores", "expert_of_token", "total_score"} <= set(arrays)


def router_from_case(config, arrays):
    """A router whose tokens are the recorded scores."""
    router = BASERouter(config["E"])
    router.build((None, config["E"]))
    router.kernel.assign(np.eye(config["E"]))
    return router
