"""The router's bias, which no recorded block of HF's Switch Transformer has."""

import numpy as np
from absl.testing import parameterized

from tests import blocks
from tests import token_loop
from tests.test_case import TestCase

BIAS = "router.classifier.bias"


def outputs_of(x, weights):
    """Each token by its most probable expert, times that probability."""
    outputs = np.zeros(x.shape)
    kernel = weights["router.classifier.weight"]
    for place in np.ndindex(x.shape[:-1]):
        probs = token_loop.softmax(kernel @ x[place] + weights[BIAS])
        expert = f"experts.expert_{np.argmax(probs)}"
        hidden = np.maximum(weights[f"{expert}.wi.weight"] @ x[place], 0.0)
        outputs[place] = weights[f"{expert}.wo.weight"] @ hidden * probs.max()
    return outputs


class SwitchBiasTest(TestCase):
    @parameterized.parameters(True, False)
    def test_bias(self, in_spec):
        spec, arrays = blocks.load("switch_transformers")
        weights = blocks.weights_of(arrays)
        weights[BIAS] = np.array([0.8, -0.5, 0.3, -0.9], "float32")
        if in_spec:
            spec["router"]["bias"] = BIAS
        layer = blocks.moe_from_spec(spec, weights, losses=None)
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer, arrays["x"], arrays["cotangent"]
        )
        exact = {k: v.astype("float64") for k, v in weights.items()}
        x = arrays["x"].astype("float64")
        wanted = outputs_of(x, exact)
        self.assertGreater(np.abs(wanted - arrays["y"]).max(), 0.1)
        self.assert_relative(outputs, wanted)
        gradients = token_loop.gradients(
            lambda parts: np.sum(
                outputs_of(parts["x"], {**exact, BIAS: parts[BIAS]})
                * arrays["cotangent"]
            ),
            {"x": x, BIAS: exact[BIAS]},
        )
        self.assert_relative(d_inputs, gradients["x"])
        self.assert_relative(d_weights["router/bias"], gradients[BIAS])
