"""Shazeer's noisy top-k gating, in two ports to PyTorch."""

from keras_moe import losses
from keras_moe import routers
from tests.routing_cases import cases


def matches(config, arrays):
    return "w_noise" in arrays and "k" in config


def is_davidmrau(config):
    return "noise_epsilon" in config


def router_from_case(config, arrays):
    options = {}
    if is_davidmrau(config):
        # The softmax over all, the largest, divided by their sum.
        options = {
            "score_after_selection": False,
            "normalize_weights": True,
            "normalize_epsilon": 1e-6,
        }
    router = routers.get(
        "noisy_top_k",
        num_experts=config["E"],
        top_k=config["k"],
        name="router",
        **options,
    )
    router.build((None, arrays["w_gate"].shape[0]))
    router.kernel.assign(arrays["w_gate"])
    router.noise_kernel.assign(arrays["w_noise"])
    return router


def importance_and_load():
    return (
        losses.ImportanceLoss(1.0, scores="weights", ddof=1),
        losses.LoadLoss(1.0, ddof=1),
    )


def draws(config, arrays):
    noise = (arrays["noise_unit"],) if config["training"] else ()
    return cases.recorded_draws(normal=noise)
