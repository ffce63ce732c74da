"""Exported layers give what the layers give, for batches of any size."""

import keras
import numpy as np

from keras_moe import experts
from keras_moe import layers
from tests.exported import export
from tests.test_case import TestCase


class MoEExportTest(TestCase):
    def check(self, *parts):
        inputs = x = keras.Input((5, 8))
        for part in parts:
            x = x + part(x)
        model = keras.Model(inputs, x)
        served = export(self, model)
        rng = np.random.default_rng(0)
        for size in (1, 7):
            batch = rng.normal(size=(size, 5, 8)).astype("float32")
            np.testing.assert_allclose(
                keras.ops.convert_to_numpy(served(batch)),
                model.predict(batch, verbose=0),
                rtol=1e-5,
                atol=1e-5,
            )

    def test_feed_forward_experts(self):
        self.check(
            layers.MoE(4, 16),
            layers.MoE(
                experts=experts.MLPExperts(4, 16),
                capacity=layers.Capacity(
                    1.0, rule="lingvo", drop_policy="priority"
                ),
            ),
        )

    def test_experts_that_get_rows(self):
        self.check(
            layers.MoE(
                router="expert_choice",
                experts=experts.LowRankExperts(4, 3),
                capacity_factor=0.5,
            ),
        )

    def test_layers_as_experts(self):
        self.check(
            layers.MoE(
                top_k=1,
                experts=experts.LayerExperts(
                    keras.layers.Dense(8, activation="tanh"), 4
                ),
                capacity=layers.Capacity(1.0, per="sequence"),
            ),
        )

    def test_soft_moe(self):
        self.check(layers.SoftMoE(4, 16))
