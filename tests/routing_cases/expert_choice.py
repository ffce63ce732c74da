"""Expert choice of V-MoE and flaxformer."""

import numpy as np

from keras_moe.routers.expert_choice_router import ExpertChoiceRouter


def matches(config, arrays):
    # Of the routers with a kernel and linear experts, those that do not say
    # how many experts a token chooses.
    if not {"x", "kernel", "expert/W", "y"} <= set(arrays):
        return False
    if "expert_capacity" in config:  # flaxformer
        return config.get("k", 0) is None
    return "dispatcher" in config and "num_selected_experts" not in config


def router_from_case(config, arrays):
    num_experts = config["E"]
    if "expert_capacity" in config:
        options = {
            "capacity": config["expert_capacity"],
            "jitter": config.get("jitter_noise", 0.0),
        }
    else:
        dispatcher = config["dispatcher"]
        options = {
            "noise_stddev": config["noise_std"] / num_experts,
            "capacity": dispatcher.get("capacity"),
            "capacity_factor": dispatcher.get("capacity_factor", 1.0),
            # What V-MoE does if it is not told.
            "capacity_multiple_of": dispatcher.get("capacity_multiple_of", 4),
        }
    router = ExpertChoiceRouter(
        num_experts, per="sequence", use_bias="bias" in arrays, **options
    )
    router.build((None, config["D"]))
    router.kernel.assign(arrays["kernel"])
    if "bias" in arrays:
        router.bias.assign(arrays["bias"])
    return router


def is_training(config):
    if "expert_capacity" in config:
        return config.get("jitter_noise", 0.0) > 0
    return not config["deterministic"]


def mask_of(config, arrays):
    """`(T,)`, or `None`. In flaxformer a token of zeros is padding."""
    if not config.get("ignore_padding_tokens"):
        return None
    return np.abs(arrays["x"]).sum(-1).reshape(-1) > 0
