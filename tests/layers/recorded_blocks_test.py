"""Blocks of HF transformers, reproduced through the public layer."""

import numpy as np
from absl.testing import parameterized
from keras import ops

import keras_moe
from tests import oracle
from tests.test_case import TestCase

NAMED = [(case, case) for case in oracle.cases()]


class RecordedBlocksTest(TestCase):
    @parameterized.named_parameters(NAMED)
    def test_outputs_and_gradients(self, case):
        spec, arrays = oracle.load(case)
        layer, imports = oracle.moe_from_spec(
            spec, oracle.weights_of(arrays), losses=None
        )
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer, arrays["x"], arrays["cotangent"]
        )
        self.assert_relative(outputs, arrays["y"])
        self.assert_relative(d_inputs, arrays["grad/x"])
        recorded = {
            k[len("grad/w/") :]: v
            for k, v in arrays.items()
            if k.startswith("grad/w/")
        }
        self.assertEqual(set(d_weights), set(imports))
        for path, gradient in d_weights.items():
            self.assert_relative(gradient, imports[path](recorded))

    @parameterized.named_parameters(NAMED)
    def test_routing(self, case):
        spec, arrays = oracle.load(case)
        layer, _ = oracle.moe_from_spec(spec, oracle.weights_of(arrays))
        routing = layer.route(arrays["x"])
        combine = np.zeros(arrays["combine"].shape, "float32")
        np.put_along_axis(
            combine,
            ops.convert_to_numpy(routing.expert_indices),
            ops.convert_to_numpy(routing.expert_weights),
            axis=-1,
        )
        self.assert_relative(combine, arrays["combine"])

    def test_load_balancing_loss(self):
        compared = 0
        for case in oracle.cases():
            spec, arrays = oracle.load(case)
            if "aux/load_balancing" not in arrays:
                continue
            layer, _ = oracle.moe_from_spec(spec, oracle.weights_of(arrays))
            loss = keras_moe.losses.LoadBalancingLoss(weight=1.0)
            top_k = spec["router"]["k"]  # transformers does not divide by it
            for mask, name in (
                (None, "aux/load_balancing"),
                (arrays["aux/attention_mask"], "aux/load_balancing_masked"),
            ):
                if mask is not None:
                    mask = ops.convert_to_tensor(mask.reshape(-1) > 0)
                value = loss(layer.route(arrays["x"]), mask)
                self.assert_relative(top_k * value, arrays[name])
                compared += 1
        self.assertGreaterEqual(compared, 12)
