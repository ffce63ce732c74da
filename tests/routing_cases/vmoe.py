"""V-MoE: noisy top-k routers, and dispatch within groups of images."""

from keras_moe import layers
from keras_moe import losses
from keras_moe import routers
from tests.routing_cases import cases


def matches(config, arrays):
    return "num_selected_experts" in config and "dispatcher" in config


def router_from_case(config, arrays):
    router = routers.get(
        "v_moe",
        num_experts=config["num_experts"],
        top_k=config["num_selected_experts"],
        noise_stddev=config["noise_std"] / config["num_experts"],
        name="router",
    )
    router.build((None, arrays["kernel"].shape[0]))
    router.kernel.assign(arrays["kernel"])
    return router


def layer_from_case(config, arrays, **kwargs):
    dispatcher = config["dispatcher"]
    return cases.moe_with_linear_experts(
        router_from_case(config, arrays),
        arrays["expert/W"],
        arrays["expert/b"],
        capacity=layers.Capacity(
            dispatcher["capacity_factor"],
            multiple_of=dispatcher.get("capacity_multiple_of", 4),
            drop_policy="priority"
            if dispatcher.get("batch_priority")
            else "position",
            per="sequence",
        ),
        **kwargs,
    )


def losses_from_case(config, arrays):
    """The losses by their recorded names; each is the mean over the groups."""
    found = {
        "gshard_loss": losses.LoadBalancingLoss(
            config["gshard_loss_weight"], per="sequence", assignments="first"
        ),
        "importance_loss": losses.ImportanceLoss(
            config["importance_loss_weight"], scores="softmax", per="sequence"
        ),
        "load_loss": losses.LoadLoss(
            config["load_loss_weight"], per="sequence"
        ),
    }
    return {k: v for k, v in found.items() if f"metric/{k}" in arrays}
