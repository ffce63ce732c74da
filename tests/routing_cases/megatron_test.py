"""Its drop policy by position is a top-k of zeros and ones, which keeps whom it
likes: of it only the counts are compared.
"""

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from tests.routing_cases import cases
from tests.routing_cases import megatron
from tests.test_case import TestCase

NAMED = cases.named(megatron.matches)


def computed_quantile_case():
    """A step of quantile balancing, made here expert by expert."""
    rng = np.random.default_rng(0)
    num_tokens, num_experts, top_k = 24, 6, 2
    scores = rng.normal(size=(num_tokens, num_experts))
    beta = 0.3 * rng.normal(size=num_experts)
    ranked = np.argsort(-(scores - beta), axis=1, kind="stable")
    alpha = np.take_along_axis(scores - beta, ranked[:, top_k:], axis=1)[:, :1]
    share = num_tokens * top_k // num_experts
    beta_new = [sorted(c)[::-1][share] for c in (scores - alpha).T]
    arrays = {
        "scores": scores,
        "beta": beta,
        "beta_new": np.array(beta_new),
        "indices": ranked[:, :top_k],
    }
    return {"k": top_k}, {
        name: array.astype("int32" if name == "indices" else "float32")
        for name, array in arrays.items()
    }


class MegatronTest(TestCase):
    @parameterized.named_parameters(NAMED)
    def test_routing(self, case):
        _, config, arrays = case
        layer = megatron.layer_from_case(config, arrays)
        num_tokens = config["N"]
        routing = layer.route(arrays["logits"])
        self.assert_relative(
            cases.combine_matrix(layer, routing, num_tokens),
            arrays["combine"],
        )
        self.assert_relative(
            cases.combine_matrix(layer, routing, num_tokens, training=True),
            arrays["drop_probs/combine"],
        )
        layer.capacity.drop_policy = "position"
        kept = cases.combine_matrix(layer, routing, num_tokens, training=True)
        self.assertAllEqual(
            (kept > 0).sum(axis=0), arrays["drop_position/map"].sum(axis=0)
        )

    def test_quantile_balancing(self):
        found = cases.find(megatron.is_quantile_balancing)
        for config, arrays in (
            computed_quantile_case(),
            *((case.config, case.arrays) for case in found),
        ):
            router = megatron.quantile_router_from_case(config, arrays)
            routing = router(arrays["scores"], training=True)
            self.assert_relative(
                -ops.convert_to_numpy(router.expert_bias), arrays["beta_new"]
            )
            self.assertGreater(np.ptp(arrays["beta_new"] - arrays["beta"]), 0)
            if "indices" in arrays:
                self.assertAllEqual(routing.expert_indices, arrays["indices"])

    @parameterized.named_parameters(NAMED)
    def test_losses(self, case):
        _, config, arrays = case
        # It ignores bias and groups: the plain largest logits count.
        balance = losses.LoadBalancingLoss(1.0, assignments="logits")
        z_loss = losses.RouterZLoss(1.0)
        layer = megatron.layer_from_case(config, arrays, losses=balance)
        routing = layer.route(arrays["logits"])
        mask = ops.array(~arrays["padding_mask"].astype(bool))
        for loss, name in ((balance, "aux"), (z_loss, "z")):
            self.assert_relative(loss(routing), arrays[f"loss/{name}"])
            self.assert_relative(
                loss(routing, mask), arrays[f"loss/{name}_padded"]
            )
        _, d_inputs, _ = self.outputs_and_gradients(
            layer, arrays["logits"], losses=True, training=True
        )
        self.assert_relative(d_inputs, arrays["grad_aux/logits"])
