import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import layers
from keras_moe import losses
from tests import token_loop
from tests.routing_cases import cases
from tests.routing_cases import gshard
from tests.test_case import TestCase

NAMED = cases.named(gshard.matches)


def gshard_loss(config, arrays):
    loss = losses.LoadBalancingLoss(1.0, per="sequence", assignments="first")
    if config["legacy_mtf_behavior"] and "paddings" in arrays:
        # The legacy mode divides by padding too, in `f` and in `P`.
        real = gshard.mask_of(arrays).sum(axis=1)
        loss = cases.DividedByAllTokens(loss, real, config["S"], 2)
    return loss


class GShardTest(TestCase):
    def layer(self, config, arrays, **kwargs):
        """The recorded gradient is one of the combine weights: an expert that
        returns its own unit vector shows them."""
        num_experts, dim = config["E"], arrays["x"].shape[-1]
        bias = np.eye(num_experts, dtype="float32")
        kernel = np.zeros((num_experts, dim, num_experts), "float32")
        return cases.moe_with_linear_experts(
            gshard.router_from_case(config, arrays),
            kernel,
            bias,
            capacity=gshard.capacity_from_case(config),
            **kwargs,
        )

    def options(self, arrays):
        mask = gshard.mask_of(arrays)
        return {} if mask is None else {"mask": ops.array(mask)}

    @parameterized.named_parameters(NAMED)
    def test_combine_and_gradients(self, case):
        _, config, arrays = case
        layer = self.layer(config, arrays, losses=None)
        with gshard.draws(config, arrays):
            combined, d_inputs, d_weights = self.outputs_and_gradients(
                layer, arrays["x"], arrays["cotangent"], **self.options(arrays)
            )
        self.assert_relative(combined, arrays["combine"].sum(axis=-1))
        dispatched = arrays["dispatch"].any(axis=-1)
        self.assertAllEqual(combined > 0, dispatched)
        self.assert_relative(d_inputs, arrays["grad_combine/x"])
        self.assert_relative(d_weights["kernel"], arrays["grad_combine/kernel"])

    def test_loss_of_the_legacy_mode_with_padding(self):
        # Not recorded here: a recorded case with padding added, by hand.
        for _, config, arrays in cases.load(gshard.matches):
            if not config["legacy_mtf_behavior"] or "uniform" in arrays:
                continue
            arrays = dict(arrays)
            arrays["paddings"] = np.arange(16.0)[None] > [[16], [12], [9]]
            logits = arrays["x"].astype("float64") @ arrays["kernel"]
            value = 0.0
            for z, padding in zip(logits, arrays["paddings"], strict=True):
                probs = np.array([token_loop.softmax(row) for row in z])
                first = np.eye(config["E"])[z.argmax(axis=-1)]
                share = first[~padding].sum(axis=0) / config["S"]
                mass = probs[~padding].sum(axis=0) / config["S"]
                value += config["E"] * np.sum(share * mass) / len(logits)
            loss = gshard_loss(config, arrays)
            mask = ops.array(gshard.mask_of(arrays))
            layer = self.layer(config, arrays, losses=None)
            routing = layer.route(arrays["x"], mask=mask)
            mask = ops.reshape(mask, (-1,))
            self.assert_relative(loss(routing, mask), value)
            return
        self.fail("No case of the legacy mode.")

    @parameterized.named_parameters(NAMED)
    def test_loss(self, case):
        _, config, arrays = case
        loss = gshard_loss(config, arrays)
        layer = self.layer(config, arrays, losses=loss)
        options = {**self.options(arrays), "training": True}
        with gshard.draws(config, arrays):
            _, d_inputs, d_weights = self.outputs_and_gradients(
                layer,
                arrays["x"],
                np.zeros_like(arrays["cotangent"]),
                losses=True,
                **options,
            )
        with gshard.draws(config, arrays):
            routing = layer.route(arrays["x"], **options)
        if "paddings" not in arrays:
            logits = arrays["logits"].reshape(-1, config["E"])
            self.assert_relative(routing.logits, logits)
        mask = gshard.mask_of(arrays)
        mask = None if mask is None else ops.array(mask.reshape(-1))
        grouped = isinstance(loss, losses.LoadBalancingLoss)
        groups = (config["G"],) if grouped else ()
        value = loss(routing, mask, *groups)
        # Its denominator with padding is the share of real tokens + 1e-6.
        self.assert_relative(value, arrays["loss/aux"])
        self.assert_relative(d_inputs, arrays["grad_aux/x"])
        self.assert_relative(d_weights["kernel"], arrays["grad_aux/kernel"])

    def test_capacity_rule(self):
        compared = 0
        for _, config, _ in cases.load(gshard.matches):
            if config.get("capacity_factor"):
                capacity = layers.Capacity(
                    config["capacity_factor"], rule="lingvo"
                )
                self.assertEqual(
                    capacity.rows_per_expert(config["S"], config["E"], 2, True),
                    config["expert_capacity"],
                )
                compared += 1
        self.assertGreaterEqual(compared, 1)
