"""Recorded cases of DSelect-k, as a `DSelectKRouter`."""

from keras_moe.routers.dselect_k_router import DSelectKRouter


def matches(config, arrays):
    return {"z_weight", "z_bias", "w_weight", "w_bias"} <= set(arrays)


def router_from_case(config, arrays, **kwargs):
    router = DSelectKRouter(
        config["E"], top_k=config["k"], gamma=config["gamma"], **kwargs
    )
    router.build((None, config["D"]))
    router.selector_kernel.assign(arrays["z_weight"].T)
    router.selector_bias.assign(arrays["z_bias"])
    if config["k"] > 1:  # the mixture of one selector is that selector
        router.mixture_kernel.assign(arrays["w_weight"].T)
        router.mixture_bias.assign(arrays["w_bias"])
    return router
