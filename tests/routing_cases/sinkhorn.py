"""Sinkhorn routing of Megatron."""

import numpy as np

from keras_moe.routers.sinkhorn_router import SinkhornRouter


def matches(config, arrays):
    return "tol" in config and "top1_of_sinkhorn" in arrays


def router_from_case(config, arrays):
    """A router whose tokens are the recorded logits."""
    router = SinkhornRouter(config["E"], config.get("k", 1), num_iterations=50)
    router.build((None, config["E"]))
    router.kernel.assign(np.eye(config["E"]))
    return router
