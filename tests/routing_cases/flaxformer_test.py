"""Padding: the scatter form lets it take places in experts 0 to k - 1 and
count in the balance loss, which is a mistake. Its outputs and its balance loss
are compared with a router that does the same, and must differ from those with a
mask. The masked form leaves padding out, as this library does; both divide by
all tokens, which the losses here are scaled to.
"""

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import losses
from tests.routing_cases import cases
from tests.routing_cases import flaxformer
from tests.routing_cases.cases import RecordedTest

NAMED = cases.named(flaxformer.matches)


class FlaxformerTest(RecordedTest):
    def read(self, case):
        _, config, arrays = case
        mask = flaxformer.padding_mask(config, arrays)
        real = np.full((config["G"], config["S"]), True)
        return config, arrays, mask, real if mask is None else mask

    def options(self, case):
        """Jitter is drawn in training alone."""
        config, arrays, mask, _ = self.read(case)
        options = {"training": "jitter" in arrays}
        if mask is not None:
            options["mask"] = ops.array(mask)
        return options

    @parameterized.named_parameters(NAMED)
    def test_routing(self, case):
        config, arrays, mask, real = self.read(case)
        layer = flaxformer.layer_from_case(config, arrays)
        with flaxformer.draws(config, arrays):
            routing = layer.route(arrays["x"], **self.options(case))
        flat = real.reshape(-1)
        if flaxformer.is_scatter(arrays):
            chosen = arrays["dispatch_indices"][..., 0]
            self.assertAllEqual(
                ops.convert_to_numpy(routing.expert_indices)[flat],
                chosen.reshape(-1, config["k"])[flat],
            )
        flat_mask = None if mask is None else ops.array(flat)
        if mask is not None and flaxformer.is_scatter(arrays):
            layer = self.padded_layer(case)
            routing, flat_mask = layer.route(arrays["x"]), None
        combined = cases.combine_matrix(
            layer, routing, config["G"], mask=flat_mask
        )
        if flaxformer.is_scatter(arrays):
            wanted = np.zeros((*flat.shape, config["E"]), "float32")
            np.put_along_axis(
                wanted,
                chosen.reshape(-1, config["k"]).astype(int),
                arrays["combine_weights_k"].reshape(-1, config["k"]),
                axis=1,
            )
        else:
            wanted = arrays["combine"].sum(axis=-1).reshape(-1, config["E"])
            dispatched = arrays["dispatch"].any(axis=-1)
            self.assertAllEqual(
                combined > 0, dispatched.reshape(combined.shape)
            )
        self.assert_relative(combined, wanted)

    def padded_layer(self, case, losses=None):
        return flaxformer.layer_from_case(
            case.config,
            case.arrays,
            flaxformer.PaddingTakesPlacesRouter,
            losses=losses,
        )

    @parameterized.named_parameters(NAMED)
    def test_outputs_and_gradients(self, case):
        config, arrays, mask, _ = self.read(case)
        layer = flaxformer.layer_from_case(config, arrays, losses=None)
        options = self.options(case)
        if mask is not None and flaxformer.is_scatter(arrays):
            # Without its places padding leaves room for more real tokens.
            with_mask = ops.convert_to_numpy(layer(arrays["x"], **options))
            self.assertGreater(np.abs(with_mask - arrays["y"]).max(), 1e-2)
            layer, options = self.padded_layer(case), {}
        with flaxformer.draws(config, arrays):
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                layer, arrays["x"], arrays["cotangent"], **options
            )
        self.assert_relative(outputs, arrays["y"])
        self.assert_relative(d_inputs, arrays["grad_y/x"])
        for name in ("kernel", "bias"):
            self.assert_relative(d_weights[name], arrays[f"grad_y/{name}"])

    @parameterized.named_parameters(NAMED)
    def test_losses(self, case):
        config, arrays, mask, real = self.read(case)
        scatter_padding = mask is not None and flaxformer.is_scatter(arrays)
        count, size = real.sum(axis=1), config["S"]
        # A padding token adds log(E)^2 to the original's z-loss.
        padding = (size - count).sum() / real.size * np.log(config["E"]) ** 2
        for name, loss, power, constant in (
            (
                "aux",
                losses.LoadBalancingLoss(1.0, normalize_by_top_k=False),
                2,
                0.0,
            ),
            ("z", losses.RouterZLoss(1.0), 1, padding),
        ):
            if name == "aux" and scatter_padding:
                self.check_loss_that_counts_padding(case)
                continue
            loss = cases.DividedByAllTokens(loss, count, size, power)
            layer = flaxformer.layer_from_case(config, arrays, losses=loss)
            options = {**self.options(case), "training": True}
            if "jitter" not in arrays:
                layer.router.jitter = 0.0
            with flaxformer.draws(config, arrays):
                _, d_inputs, d_weights = self.outputs_and_gradients(
                    layer,
                    arrays["x"],
                    np.zeros_like(arrays["cotangent"]),
                    losses=True,
                    **options,
                )
            with flaxformer.draws(config, arrays):
                routing = layer.route(arrays["x"], **options)
            flat_mask = None if mask is None else ops.array(real.reshape(-1))
            key = {"aux": "auxiliary", "z": "router_z"}[name]
            self.assert_relative(
                loss(routing, flat_mask) + constant, arrays[f"loss/{key}"]
            )
            self.assert_relative(d_inputs, arrays[f"grad_{name}/x"], 1e-5)
            for weight in ("kernel", "bias"):
                self.assert_relative(
                    d_weights[weight], arrays[f"grad_{name}/{weight}"]
                )

    def check_loss_that_counts_padding(self, case):
        config, arrays, _, real = self.read(case)
        loss = losses.LoadBalancingLoss(
            1.0, per="sequence", normalize_by_top_k=False, scores="raw"
        )
        layer = self.padded_layer(case, losses=loss)
        _, d_inputs, d_weights = self.outputs_and_gradients(
            layer,
            arrays["x"],
            np.zeros_like(arrays["cotangent"]),
            losses=True,
            training=True,
        )
        value = loss(layer.route(arrays["x"]), None, config["G"])
        self.assert_relative(value, arrays["loss/auxiliary"])
        self.assert_relative(d_inputs, arrays["grad_aux/x"])
        for name in ("kernel", "bias"):
            self.assert_relative(d_weights[name], arrays[f"grad_aux/{name}"])
        # With a mask the same loss does not count padding.
        mask = ops.array(real.reshape(-1))
        masked = flaxformer.layer_from_case(config, arrays)
        routing = masked.route(arrays["x"], **self.options(case))
        value = float(ops.convert_to_numpy(loss(routing, mask, config["G"])))
        self.assertGreater(abs(value - arrays["loss/auxiliary"]), 0.1)
