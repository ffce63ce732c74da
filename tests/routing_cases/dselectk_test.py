"""DSelect-k as LibMTL has it.

Its entropy is a sum over the tokens; here losses are means over the tokens. The
penalty for unused codes is not recorded.
"""

import keras
import numpy as np
from keras import ops

from keras_moe.ops.smooth_step import smooth_step
from tests.routers.dense_weights import DenseWeights
from tests.routing_cases import dselectk
from tests.routing_cases.cases import RecordedTest
from tests.routing_cases.cases import load

NAMES = {
    "selector_kernel": "z_weight",
    "selector_bias": "z_bias",
    "mixture_kernel": "w_weight",
    "mixture_bias": "w_bias",
}


class Mixture(DenseWeights):
    """With the recorded linear experts, each computed for every token."""

    def __init__(self, router, expert_kernels):
        super().__init__(router)
        self.expert_kernels = expert_kernels

    def call(self, tokens):
        weights = super().call(tokens)
        kernels = ops.convert_to_tensor(self.expert_kernels)
        return ops.einsum("te,td,edf->tf", weights, tokens, kernels)


class DSelectKCasesTest(RecordedTest):
    def test_selectors_and_weights(self):
        for name, config, arrays in load(dselectk.matches):
            with self.subTest(name):
                router = dselectk.router_from_case(config, arrays)
                tokens = ops.convert_to_tensor(arrays["x"])
                self.assert_relative(
                    router.selectors(tokens), arrays["selectors"]
                )
                self.assert_relative(
                    router(tokens).probs, arrays["expert_weights"]
                )
                layer = DenseWeights(router)
                self.assert_relative(layer(tokens), arrays["expert_weights"])

    def test_outputs_and_gradients(self):
        for name, config, arrays in load(dselectk.matches):
            with self.subTest(name):
                router = dselectk.router_from_case(config, arrays)
                layer = Mixture(router, arrays["expert_W"])
                layer.build((None, config["D"]))
                y, d_x, d_weights = self.outputs_and_gradients(
                    layer, arrays["x"], arrays["cotangent"]
                )
                self.assert_relative(y, arrays["y"])
                self.assert_relative(d_x, arrays["grad_y/x"])
                self.compare(d_weights, arrays, "grad_y", 1.0)
                if config["k"] == 1:
                    for key in ("w_weight", "w_bias"):
                        self.assertAllClose(arrays[f"grad_y/{key}"], 0.0)

    def test_entropy_and_its_gradients(self):
        for name, config, arrays in load(dselectk.matches):
            with self.subTest(name):
                router = dselectk.router_from_case(
                    config, arrays, entropy_weight=1.0, unused_code_weight=0.0
                )
                num_tokens = len(arrays["x"])
                layer = DenseWeights(router)
                layer.build((None, config["D"]))
                _, d_x, d_weights = self.outputs_and_gradients(
                    layer,
                    arrays["x"],
                    np.zeros((num_tokens, config["E"])),
                    losses=True,
                    training=True,
                )
                self.assert_relative(num_tokens * d_x, arrays["grad_entropy/x"])
                self.compare(d_weights, arrays, "grad_entropy", num_tokens)
                router = dselectk.router_from_case(
                    config, arrays, entropy_weight=1.0, unused_code_weight=0.0
                )
                router(arrays["x"], training=True)
                self.assert_relative(
                    num_tokens * ops.convert_to_numpy(router.losses[0]),
                    arrays["entropy"],
                )

    def compare(self, gradients, arrays, prefix, scale):
        for path, gradient in gradients.items():
            key = f"{prefix}/{NAMES[path.split('/')[-1]]}"
            # The entropy does not depend on the mixture.
            expected = arrays.get(key, np.zeros(gradient.shape[::-1]))
            self.assert_relative(scale * gradient, expected.T)

    def test_smooth_step(self):
        for name, config, arrays in load(dselectk.matches):
            with self.subTest(name):
                gamma = config["gamma"]
                layer = keras.layers.Lambda(
                    lambda t, g=gamma: smooth_step(t, g)
                )
                layer.build(arrays["smooth_step/t"].shape)
                s, ds, _ = self.outputs_and_gradients(
                    layer, arrays["smooth_step/t"]
                )
                self.assert_relative(s, arrays["smooth_step/s"])
                self.assert_relative(ds, arrays["smooth_step/ds"])
