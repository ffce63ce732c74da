"""databricks/megablocks: softmax routers of some layers, p-norm weights."""

from keras_moe.losses import LoadBalancingLoss
from keras_moe.losses import RouterZLoss
from keras_moe.routers import TopKRouter


def matches(config, arrays):
    return "moe_zloss_weight" in config and "layer0/weight" in arrays


def router_from_case(config, arrays, layer=0):
    order = config["normalize_p"]
    router = TopKRouter(
        config["E"],
        config["k"],
        normalize_weights=bool(order),
        normalize_order=order or 1,
        jitter=config["jitter_eps"] or 0.0,
    )
    kernel = arrays[f"layer{layer}/weight"].T
    router.build((None, kernel.shape[0]))
    router.kernel.assign(kernel)
    return router


def losses_from_case(config):
    # They average the balancing losses of the layers, and leave the z-losses
    # for the caller to sum.
    return (
        LoadBalancingLoss(config["moe_loss_weight"] / config["layers"]),
        RouterZLoss(config["moe_zloss_weight"]),
    )
