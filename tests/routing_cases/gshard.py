"""GShard's top-2 gating as lingvo has it."""

from keras_moe import layers
from keras_moe import routers
from tests.routing_cases import cases


def matches(config, arrays):
    return "legacy_mtf_behavior" in config


def mask_of(arrays):
    return 1 - arrays["paddings"] > 0 if "paddings" in arrays else None


def router_from_case(config, arrays):
    policy, threshold = config["policy"], config.get("threshold")
    router = routers.get(
        "gshard",
        num_experts=config["E"],
        policy=policy,
        threshold=threshold or 0.5,
        # The later mode normalizes what is left after dropping.
        normalize_weights=config["legacy_mtf_behavior"],
        normalize_epsilon=1e-9,
        random_in_inference=True,
        name="router",
    )
    router.build((None, arrays["kernel"].shape[0]))
    router.kernel.assign(arrays["kernel"])
    return router


def capacity_from_case(config):
    factor = config.get("capacity_factor")
    size = None if factor else config["expert_capacity"]
    return layers.Capacity(
        factor,
        size=size,
        rule="lingvo",
        per="sequence",
        normalize_kept_weights=not config["legacy_mtf_behavior"],
    )


def draws(config, arrays):
    return cases.recorded_draws(
        uniform=(arrays["uniform"],) if "uniform" in arrays else ()
    )
