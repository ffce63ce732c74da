"""Megatron's drop policy by position is a top-k of zeros and ones, which may
keep any of the tied tokens: here only the counts are compared.
"""

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from keras_moe.ops.assignments import expert_scores
from tests.routing_cases import cases
from tests.routing_cases import megatron
from tests.routing_cases.cases import RecordedTest

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


class MegatronTest(RecordedTest):
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
        self.assertAllEqual(
            arrays["drop_probs/map"], arrays["drop_probs/combine"] > 0
        )
        layer.capacity.drop_policy = "position"
        kept = cases.combine_matrix(layer, routing, num_tokens, training=True)
        self.assertAllEqual(
            (kept > 0).sum(axis=0), arrays["drop_position/map"].sum(axis=0)
        )
        # Whom it kept, it gave the weight that the expert has without drops.
        kept_there = arrays["drop_position/map"]
        self.assert_relative(
            arrays["combine"] * kept_there, arrays["drop_position/combine"]
        )

    @parameterized.named_parameters(NAMED)
    def test_filling_up_to_capacity(self, case):
        # Its experts take tokens that did not choose them, with weight 0, until
        # they are full. Here places stay empty: the same weights.
        _, config, arrays = case
        layer = megatron.layer_from_case(config, arrays)
        size = layer.capacity.rows_per_expert(
            config["N"], config["E"], config["k"], True
        )
        for name in ("drop_probs", "drop_position"):
            filled = arrays[f"{name}_pad/map"]
            self.assertAllEqual(filled.sum(axis=0), [size] * config["E"])
            self.assertTrue((filled >= arrays[f"{name}/map"]).all())
            self.assertAllEqual(
                arrays[f"{name}_pad/combine"], arrays[f"{name}/combine"]
            )

    @parameterized.named_parameters(NAMED)
    def test_choices_and_gradients(self, case):
        _, config, arrays = case
        num_experts = config["E"]
        layer = megatron.layer_from_case(
            config, arrays, np.eye(num_experts), losses=None
        )
        # Each expert returns its own unit vector: the outputs are the weights.
        outputs, d_logits, _ = self.outputs_and_gradients(
            layer, arrays["logits"], arrays["cotangent"]
        )
        self.assert_relative(outputs, arrays["combine"])
        self.assertAllEqual(outputs > 0, arrays["routing_map"])
        self.assert_relative(d_logits, arrays["grad_combine/logits"])
        routing = layer.route(arrays["logits"])
        # What its balance loss takes: bias and groups left out.
        scores = ops.convert_to_numpy(expert_scores(routing, "router", None))
        self.assert_relative(scores, arrays["aux_scores"])
        best = np.argsort(-arrays["logits"], axis=1, kind="stable")
        best = best[:, : config["k"]]
        plain = np.zeros(arrays["aux_routing_map"].shape, bool)
        np.put_along_axis(plain, best, True, axis=1)
        self.assertAllEqual(plain, arrays["aux_routing_map"])

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
        for loss, name in ((balance, "aux"), (z_loss, "z")):
            layer = megatron.layer_from_case(config, arrays, losses=loss)
            _, d_logits, _ = self.outputs_and_gradients(
                layer, arrays["logits"], losses=True, training=True
            )
            self.assert_relative(d_logits, arrays[f"grad_{name}/logits"])
