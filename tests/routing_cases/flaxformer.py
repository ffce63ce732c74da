"""flaxformer: tokens choose, in its scatter and its masked form."""

import numpy as np
from keras import ops

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


class PaddingTakesPlacesRouter(routers.TopKRouter):
    """What the scatter form does: padding goes to experts 0 to k - 1.

    It has no score and no weight there, but takes places and is counted.
    """

    def call(self, tokens, mask=None, training=None):
        routing = super().call(tokens, training=training)
        real = ops.any(ops.not_equal(tokens, 0), axis=-1, keepdims=True)
        zeros = ops.zeros_like(routing.expert_indices)
        first = zeros + ops.arange(self.top_k, dtype="int32")
        share = ops.cast(real, "float32")
        return routing._replace(
            probs=routing.probs * share,
            expert_indices=ops.where(real, routing.expert_indices, first),
            expert_weights=routing.expert_weights * share,
        )


def router_from_case(config, arrays, make=routers.TopKRouter):
    router = make(
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


def layer_from_case(config, arrays, make=routers.TopKRouter, **kwargs):
    prioritized = config["batch_prioritized_routing"]
    return cases.moe_with_linear_experts(
        router_from_case(config, arrays, make),
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
