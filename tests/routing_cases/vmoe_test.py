import numpy as np
from absl.testing import parameterized
from keras import ops

from tests.routing_cases import cases
from tests.routing_cases import vmoe
from tests.routing_cases.cases import RecordedTest

NAMED = cases.named(vmoe.matches)


class VMoETest(RecordedTest):
    def draws(self, case):
        noise = case.arrays.get("noise_unit")
        return cases.recorded_draws(normal=() if noise is None else (noise,))

    def is_noisy(self, case):
        return not case.config["deterministic"]

    @parameterized.named_parameters(NAMED)
    def test_routing(self, case):
        _, config, arrays = case
        layer = vmoe.layer_from_case(config, arrays)
        groups = len(arrays["x"])
        with self.draws(case):
            routing = layer.route(arrays["x"], training=self.is_noisy(case))
        if "logits" in arrays:
            self.assert_relative(
                routing.logits, arrays["logits"].reshape(-1, config["E"])
            )
        if "indices" in arrays:  # (expert, place in its queue)
            wanted = arrays["indices"][..., 0]
            self.assertAllEqual(
                routing.expert_indices, wanted.reshape(-1, wanted.shape[-1])
            )
        combined = cases.combine_matrix(
            layer, routing, groups, training=self.is_noisy(case)
        )
        if "combine" in arrays:
            wanted = arrays["combine"].sum(axis=-1).reshape(-1, config["E"])
            self.assert_relative(combined, wanted)
            dispatched = arrays["dispatch"].any(axis=-1)
            self.assertAllEqual(
                combined > 0, dispatched.reshape(combined.shape)
            )
        if "combine_weights_k" in arrays:
            # Before any is dropped.
            weights = arrays["combine_weights_k"]
            self.assert_relative(
                routing.expert_weights, weights.reshape(-1, weights.shape[-1])
            )
        if "kept" in arrays and arrays["kept"].shape[-1] == config["E"]:
            wanted = arrays["kept"].reshape(-1, config["E"]) > 0
            self.assertAllEqual(combined > 0, wanted)

    @parameterized.named_parameters(NAMED)
    def test_outputs_and_gradients(self, case):
        _, config, arrays = case
        layer = vmoe.layer_from_case(config, arrays, losses=None)
        with self.draws(case):
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                layer,
                arrays["x"],
                arrays["cotangent"],
                training=self.is_noisy(case),
            )
        self.assert_relative(outputs, arrays["y"])
        self.assert_relative(d_inputs, arrays["grad_y/x"])
        for path, name in (
            ("kernel", "kernel"),
            ("experts/kernel", "expert/W"),
            ("experts/bias", "expert/b"),
        ):
            self.assert_relative(d_weights[path], arrays[f"grad_y/{name}"])

    @parameterized.named_parameters(NAMED)
    def test_losses(self, case):
        _, config, arrays = case
        found = vmoe.losses_from_case(config, arrays)
        self.assertGreaterEqual(len(found), 2)
        groups = len(arrays["x"])
        zeros = np.zeros_like(arrays["cotangent"])
        total = 0.0
        for name, loss in found.items():
            weight, loss.weight = loss.weight, 1.0
            # Noise, and losses, are of training alone; where the original ran
            # without noise, the router here is one without.
            layer = vmoe.layer_from_case(config, arrays, losses=loss)
            training = True
            if not self.is_noisy(case):
                layer.router.noise_stddev = 0.0
            with self.draws(case) if self.is_noisy(case) else zero_noise(case):
                _, d_inputs, d_weights = self.outputs_and_gradients(
                    layer, arrays["x"], zeros, losses=True, training=training
                )
            with self.draws(case) if self.is_noisy(case) else zero_noise(case):
                routing = layer.route(arrays["x"], training=training)
            value = loss(routing, None, groups)
            self.assert_relative(value, arrays[f"metric/{name}"].mean())
            total = total + weight * value
            # Recorded is the gradient of the sum over the groups.
            self.assert_relative(
                groups * d_inputs, arrays[f"grad_{name}/x"], 1e-4
            )
            self.assert_relative(
                groups * d_weights["kernel"],
                arrays[f"grad_{name}/kernel"],
                1e-4,
            )
        self.assert_relative(
            ops.convert_to_numpy(total),
            arrays["metric/auxiliary_loss"].mean(),
        )


def zero_noise(case):
    shape = (*case.arrays["x"].shape[:2], case.config["E"])
    return cases.recorded_draws(normal=(np.zeros(shape, "float32"),))
