"""`MoE` that sends whole examples to experts."""

import keras
import numpy as np
from keras import ops

from keras_moe.experts import LayerExperts
from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter
from tests import token_loop
from tests.test_case import TestCase


class RoutePerExampleTest(TestCase):
    def layer(self, **kwargs):
        return MoE(
            router=TopKRouter(
                3,
                2,
                name="router",
                kernel_initializer=keras.initializers.RandomNormal(1.0, seed=1),
            ),
            experts=LayerExperts(
                keras.layers.Conv1D(6, 2, padding="same", activation="tanh"), 3
            ),
            route_per="example",
            **kwargs,
        )

    def test_convolutions(self):
        layer = self.layer()
        x = np.random.default_rng(0).normal(size=(6, 4, 5)).astype("float32")
        outputs = layer(x)
        kernel = ops.convert_to_numpy(layer.router.kernel)
        wanted = np.zeros((6, 4, 6))
        for b in range(6):
            logits = x[b].mean(axis=0) @ kernel
            chosen = np.argsort(-logits, kind="stable")[:2]
            weights = token_loop.softmax(logits[chosen])
            for w, e in zip(weights, chosen, strict=True):
                expert = layer.experts.layers[e]
                wanted[b] += w * ops.convert_to_numpy(expert(x[b : b + 1]))[0]
        self.assert_relative(outputs, wanted)
        self.assertEqual(layer.compute_output_shape(x.shape), (6, 4, 6))

    def test_recurrent_experts_change_the_rank(self):
        layer = MoE(
            router=TopKRouter(2, top_k=1),
            experts=LayerExperts(keras.layers.SimpleRNN(3), 2),
            route_per="example",
        )
        x = keras.Input((4, 5))
        model = keras.Model(x, layer(x))
        self.assertEqual(model.output_shape, (None, 3))
        model.compile("adam", "mse")
        history = model.fit(
            np.ones((8, 4, 5)), np.ones((8, 3)), epochs=3, verbose=0
        )
        self.assertTrue(np.isfinite(history.history["loss"]).all())

    def test_masked_positions_do_not_route(self):
        layer = self.layer()
        rng = np.random.default_rng(0)
        x = rng.normal(size=(6, 4, 5)).astype("float32")
        mask = np.arange(4) < np.array([[4], [3], [2], [1], [0], [4]])
        other = np.where(mask[..., None], x, np.nan)
        self.assertAllClose(
            layer(x, mask=ops.array(mask)), layer(other, mask=ops.array(mask))
        )
        routing = layer.route(x, mask=ops.array(mask))
        kernel = ops.convert_to_numpy(layer.router.kernel)
        means = np.stack([x[b, mask[b]].mean(axis=0) for b in range(4)])
        self.assert_relative(routing.logits[:4], means @ kernel)
        # An example without any position gives zero.
        outputs = ops.convert_to_numpy(layer(x, mask=ops.array(mask)))
        self.assertAllEqual(outputs[4], np.zeros((4, 6)))

    def test_long_examples_in_half_precision(self):
        layer = self.layer(dtype="mixed_float16")
        x = np.full((2, 1000, 5), 100.0)
        masked = layer.route(x, mask=np.ones((2, 1000), bool))
        self.assertAllClose(masked.logits, layer.route(x).logits, rtol=1e-2)

    def test_shared_experts_over_time(self):
        layer = self.layer(
            shared_experts=keras.layers.SimpleRNN(6, return_sequences=True)
        )
        x = np.ones((2, 4, 5), "float32")
        outputs = layer(x, mask=np.ones((2, 4), bool))
        self.assertAllClose(outputs, layer(x), atol=1e-6)

    def test_needs_positions(self):
        with self.assertRaisesRegex(ValueError, "rank 3 or more"):
            self.layer()(np.ones((3, 5)))
