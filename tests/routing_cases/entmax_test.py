"""Sparsemax, entmax-1.5 and entmax as PyPI's entmax has them.

Not compared: the maps onto other sets (`budget`, `normmax`), which no router
here uses, and the values of the Fenchel-Young losses, which are not losses of
routing; their gradient is `p - target`, which is.
"""

import numpy as np
from keras import ops

from keras_moe.ops.entmax import entmax15
from keras_moe.ops.entmax import sparsemax
from tests.ops.entmax_test import Entmax
from tests.routers.dense_weights import DenseWeights
from tests.routing_cases import entmax
from tests.routing_cases.cases import RecordedTest
from tests.routing_cases.cases import load


class EntmaxCasesTest(RecordedTest):
    def test_maps_and_gradients(self):
        compared = set()
        for name, config, arrays in load(entmax.matches):
            for key in [k for k in arrays if k.startswith("p/")]:
                alpha = entmax.alpha_of(key.removeprefix("p/"))
                if alpha is None:
                    continue
                with self.subTest(f"{name} {key}"):
                    self.compare(config, arrays, key, alpha)
                compared.add(key)
        self.assertLessEqual({"p/sparsemax", "p/entmax15"}, compared)

    def compare(self, config, arrays, key, alpha):
        logits, cotangent = arrays["logits"], arrays["cotangent"]
        if alpha == "rows":
            layer = Entmax(arrays["alpha_rows"])
        else:
            router = entmax.router_from_case(config, arrays, alpha)
            layer = DenseWeights(router)
            layer.build(logits.shape)
        p, d_logits, d_alpha = self.outputs_and_gradients(
            layer, logits, cotangent
        )
        self.assert_relative(p, arrays[key])
        # Where tau is searched for, float32 leaves its mark on the recorded
        # gradients, too.
        gradient = arrays[key.replace("p/", "grad/")]
        self.assert_relative(d_logits, gradient, 1e-4)
        if alpha == "rows":
            # Recorded 2.9e-5 where all logits are equal, and it has to be 0.
            self.assert_relative(
                d_alpha["alpha"], arrays["grad_alpha_rows"], 1e-4
            )

    def test_exact_zeros(self):
        for name, _, arrays in load(entmax.matches):
            for function in (sparsemax, entmax15):
                key = f"p/{function.__name__}"
                with self.subTest(f"{name} {key}"):
                    p = function(ops.convert_to_tensor(arrays["logits"]))
                    self.assertAllEqual(
                        ops.convert_to_numpy(p) > 0, arrays[key] > 0
                    )

    def test_gradients_of_fenchel_young_losses(self):
        for name, _, arrays in load(entmax.matches):
            for function in (sparsemax, entmax15):
                key = f"loss_grad/{function.__name__}"
                if key not in arrays:
                    continue
                with self.subTest(f"{name} {key}"):
                    p = function(ops.convert_to_tensor(arrays["logits"]))
                    target = np.eye(p.shape[-1])[arrays["target"]]
                    self.assert_relative(
                        ops.convert_to_numpy(p) - target, arrays[key]
                    )
