"""Recorded cases of ReMoE, as a `ReLURouter`."""

from keras_moe.routers.relu_router import ReLURouter


def matches(config, arrays):
    return {"x", "weight", "routing_map", "l1_over_coeff"} <= set(arrays)


def router_from_case(config, arrays):
    router = ReLURouter(
        config["E"],
        top_k=config["k"],
        # It has to start above 0; losses and gradients are linear in it.
        initial_l1_coefficient=config["l1_coeff"] or 1e-8,
    )
    router.build((None, config["D"]))
    router.kernel.assign(arrays["weight"].T)
    return router
