"""flaxformer: tokens choose, in its scatter and its masked form."""

import numpy as np

from keras_moe import layers
from keras_moe import routers
from tests.routing_cases import cases


def matches(config, arrays):
    return config.get("k") is not None and "ignore_padding_tokens" in config


def is_scatter(arrays):
    return "dispatch_indices" in arrays


def padding_mask(config, arrays):
    """`(G, S)`, or `None`: a token is padding if all of it is 0."""
    if not config["ignore_padding_tokens"]:
        return None
    return np.abs(arrays["x"]).sum(axis=-1) > 0


def router_from_case(config, arrays):
    router = routers.TopKRouter(
        config["E"],
        config["k"],
        normalize_weights=False,
        use_bias=True,
        jitter=config["jitter_noise"],
        name="router",
    )
    router.build((None, arrays["kernel"].shape[0]))
    router.kernel.assign(arrays["kernel"])
    router.bias.assign(arrays["bias"])
    return router


def layer_from_case(config, arrays, **kwargs):
    prioritized = config["batch_prioritized_routing"]
    return cases.moe_with_linear_experts(
        router_from_case(config, arrays),
        arrays["expert/W"],
        arrays["expert/b"],
        capacity=layers.Capacity(
            size=config["expert_capacity"],
            drop_policy="priority" if prioritized else "position",
            per="sequence",
        ),
        **kwargs,
    )


def draws(config, arrays):
    """Recorded are the factors; a uniform between 0 and 1 makes them."""
    if "jitter" not in arrays:
        return cases.recorded_draws()
    jitter = config["jitter_noise"]
    unit = (arrays["jitter"].astype("float64") - (1 - jitter)) / (2 * jitter)
    return cases.recorded_draws(uniform=(unit.astype("float32"),))
