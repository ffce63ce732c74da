"""Two things are peculiar to st-moe-pytorch. Its balance loss counts after
dropping, by a mask that is changed in place; here it counts before, as in the
papers, so the two agree only where no first choice was dropped. And its
dispatch carries a straight-through gradient into the router, which no paper
has: the gradient of the outputs is ours plus what comes that way.
"""

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from tests import token_loop
from tests.routing_cases import cases
from tests.routing_cases import st_moe
from tests.routing_cases.cases import RecordedTest

NAMED = cases.named(st_moe.matches)


class STMoETest(RecordedTest):
    @parameterized.named_parameters(NAMED)
    def test_outputs_and_routing(self, case):
        _, config, arrays = case
        layer = st_moe.layer_from_case(config, arrays, losses=None)
        training = config["training"]
        with st_moe.draws(arrays):
            outputs = layer(arrays["x"], training=training)
        self.assert_relative(outputs, arrays["y"])
        with st_moe.draws(arrays):
            routing = layer.route(arrays["x"], training=training)
        combined = cases.combine_matrix(
            layer, routing, config["B"], training=training
        )
        wanted = arrays["combine"].sum(axis=-1).reshape(-1, config["E"])
        self.assert_relative(combined, wanted)
        dispatched = arrays["dispatch"].sum(axis=-1) > 0
        self.assertAllEqual(combined > 0, dispatched.reshape(combined.shape))
        capacity = layer.capacity.rows_per_expert(
            config["N"], config["E"], config["top_n"], training
        )
        self.assertEqual(capacity, config["capacity"])

    @parameterized.named_parameters(NAMED)
    def test_gradients_of_outputs(self, case):
        _, config, arrays = case
        layer = st_moe.layer_from_case(config, arrays, losses=None)
        with st_moe.draws(arrays):
            _, d_inputs, d_weights = self.outputs_and_gradients(
                layer,
                arrays["x"],
                arrays["cotangent"],
                training=config["training"],
            )
        extra = token_loop.gradients(
            lambda parts: through_dispatch(config, arrays, parts),
            {name: arrays[name] for name in ("x", "gate_weight")},
        )
        for name, gradient in (
            ("x", d_inputs),
            ("gate_weight", d_weights["kernel"].T),
        ):
            recorded = arrays[f"grad_y/{name}"]
            self.assertGreater(np.abs(extra[name]).max(), 1e-3)
            self.assert_relative(gradient + extra[name], recorded, 1e-4)

    @parameterized.named_parameters(NAMED)
    def test_losses(self, case):
        _, config, arrays = case
        if not config["training"]:
            layer = st_moe.layer_from_case(config, arrays)
            with st_moe.draws(arrays):
                layer(arrays["x"])
            self.assertEqual(layer.losses, [])  # recorded: 0
            self.assertEqual(np.sum(np.abs(arrays["loss/balance"])), 0.0)
            return
        for name, loss in (
            (
                "balance",
                losses.LoadBalancingLoss(
                    1.0, per="sequence", assignments="first"
                ),
            ),
            ("z", losses.RouterZLoss(1.0)),
        ):
            layer = st_moe.layer_from_case(config, arrays, losses=loss)
            with st_moe.draws(arrays):
                _, d_inputs, d_weights = self.outputs_and_gradients(
                    layer,
                    arrays["x"],
                    np.zeros_like(arrays["cotangent"]),
                    losses=True,
                    training=True,
                )
            with st_moe.draws(arrays):
                routing = layer.route(arrays["x"], training=True)
            value = loss(routing, None, config["B"])
            value = float(ops.convert_to_numpy(value))
            if name == "balance" and self.drops_first_choices(config, arrays):
                # What it leaves out makes it smaller.
                self.assertGreater(value, float(arrays["loss/balance"]))
                continue
            total = arrays["loss/total"]
            parts = arrays["loss/balance"], arrays["loss/router_z"]
            self.assert_relative(1e-2 * parts[0] + 1e-3 * parts[1], total)
            key = {"balance": "balance", "z": "router_z"}[name]
            self.assert_relative(value, arrays[f"loss/{key}"])
            self.assert_relative(d_inputs, arrays[f"grad_{name}/x"])
            self.assert_relative(
                d_weights["kernel"], arrays[f"grad_{name}/gate_weight"].T
            )

    def drops_first_choices(self, config, arrays):
        logits = arrays["x"] @ arrays["gate_weight"].T
        if "gumbel_uniform" in arrays:
            logits = logits - np.log(-np.log(arrays["gumbel_uniform"]))
        first = logits.argmax(axis=-1)  # (B, N)
        counts = [np.bincount(row, minlength=config["E"]) for row in first]
        return np.max(counts) > config["capacity"]


def through_dispatch(config, arrays, parts):
    """The outputs, if the experts' inputs are multiplied by the weights of
    `parts`; all else is as recorded. In the original these weights are ones,
    with the gradient of the weights.
    """
    logits = parts["x"] @ parts["gate_weight"].T
    if "gumbel_uniform" in arrays:
        logits = logits - np.log(-np.log(arrays["gumbel_uniform"]))
    probs = np.apply_along_axis(token_loop.softmax, -1, logits)
    combine = arrays["combine"].sum(axis=-1).astype("float64")  # (B, N, E)
    last = np.sort(logits, axis=-1)[..., -config["top_n"]]
    chosen = logits >= last[..., None]
    weights = probs * chosen / (probs * chosen).sum(axis=-1, keepdims=True)
    weights = np.where(arrays["dispatch"].any(axis=-1), weights, 0.0)
    products = np.einsum("bnd,edf->bnef", arrays["x"], arrays["expert/W"])
    outputs = np.einsum("bne,bne,bnef->bnf", combine, weights, products)
    return np.sum(outputs * arrays["cotangent"])
