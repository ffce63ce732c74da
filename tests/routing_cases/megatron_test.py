"""Its drop policy by position is a top-k of zeros and ones, which keeps whom it
likes: of it only the counts are compared.
"""

from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from tests.routing_cases import cases
from tests.routing_cases import megatron
from tests.test_case import TestCase

NAMED = cases.named(megatron.matches)


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
