"""Tutel: its queues and capacities, and its load and importance loss."""

from keras_moe import layers
from keras_moe import routers
from tests.routing_cases import cases


def matches(config, arrays):
    return "w_gate" in arrays and "w_noise" not in arrays


def router_from_case(config, arrays):
    router = routers.TopKRouter(
        config["E"],
        config["k"],
        normalize_weights=config.get("normalize_gate", False)
        and config["k"] > 1,
        name="router",
    )
    router.build((None, arrays["w_gate"].shape[1]))
    router.kernel.assign(arrays["w_gate"].T)
    return router


def capacity_from_case(config):
    # 0 is the largest load, a negative factor at most that: nothing that
    # either keeps depends on it.
    factor = abs(config["capacity_factor"]) or None
    prioritized = config["batch_prioritized"]
    return layers.Capacity(
        factor,
        rule="tutel",
        multiple_of=config["alignment"],
        drop_policy="priority" if prioritized else "position",
    )


def layer_from_case(config, arrays, kernel, bias, **kwargs):
    return cases.moe_with_linear_experts(
        router_from_case(config, arrays),
        kernel,
        bias,
        capacity=capacity_from_case(config),
        **kwargs,
    )
