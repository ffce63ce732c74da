"""ST-MoE's threshold policy as st-moe-pytorch has it."""

from keras_moe import layers
from keras_moe import routers
from tests.routing_cases import cases


def matches(config, arrays):
    return "top_n" in config and "draws_second_expert" in arrays


def router_from_case(config, arrays):
    router = routers.get(
        "st_moe",
        num_experts=config["E"],
        top_k=config["top_n"],
        threshold=config["threshold"],
        gumbel_noise=float(config["gumbel"]),
        random_in_inference=True,
        name="router",
    )
    router.build((None, arrays["gate_weight"].shape[1]))
    router.kernel.assign(arrays["gate_weight"].T)
    return router


def layer_from_case(config, arrays, **kwargs):
    return cases.moe_with_linear_experts(
        router_from_case(config, arrays),
        arrays["expert/W"],
        arrays["expert/b"],
        capacity=layers.Capacity(
            config["capacity_factor"], rule="mesh", per="sequence"
        ),
        **kwargs,
    )


def draws(arrays):
    """The Gumbel noise of the logits first, then who stays."""
    found = []
    if "gumbel_uniform" in arrays:
        found.append(arrays["gumbel_uniform"])
    return cases.recorded_draws(
        uniform=(*found, arrays["draws_second_expert"][1:].transpose(1, 2, 0))
    )
