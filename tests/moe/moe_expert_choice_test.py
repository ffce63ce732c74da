"""`MoE` with experts that choose."""

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.routers import ExpertChoiceRouter
from tests import token_loop
from tests.moe.moe_test import SHAPE
from tests.moe.moe_test import inputs
from tests.moe.moe_test import weights_of
from tests.test_case import TestCase


class ExpertChoiceTest(TestCase):
    """Experts choose: few rows, and another way back to the tokens."""

    def layer(self, **kwargs):
        return MoE(
            router=ExpertChoiceRouter(
                4,
                capacity_factor=1.0,
                name="router",
                kernel_initializer=keras.initializers.RandomNormal(1.0, seed=1),
            ),
            experts=GLUExperts(
                4,
                3,
                name="experts",
                kernel_initializer=keras.initializers.GlorotUniform(seed=2),
            ),
            losses=None,
            **kwargs,
        )

    def forward(self, arrays):
        tokens = arrays["x"].reshape(-1, SHAPE[-1])
        logits = tokens @ arrays["router/kernel"]
        probs = np.stack([token_loop.softmax(row) for row in logits])
        outputs = np.zeros(tokens.shape)
        for e in range(4):  # each takes its 3 best of the 12
            for t in np.argsort(-probs[:, e], kind="stable")[:3]:
                row = token_loop.expert(tokens[t], arrays, e, "silu")
                outputs[t] += probs[t, e] * row
        return outputs

    def test_outputs_and_gradients(self):
        layer = self.layer()
        layer.build(SHAPE)
        x, cotangent = inputs(0), inputs(1)
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer, x, cotangent
        )
        arrays = {"x": x.astype("float64"), **weights_of(layer)}
        self.assert_relative(outputs, self.forward(arrays).reshape(SHAPE))
        wanted = token_loop.gradients(
            lambda a: np.sum(self.forward(a) * cotangent.reshape(-1, 5)),
            arrays,
        )
        self.assert_relative(d_inputs, wanted.pop("x"), 1e-4)
        for path, gradient in wanted.items():
            self.assert_relative(d_weights[path], gradient, 1e-4)

    @parameterized.parameters("batch", "sequence")
    def test_last_batch_is_smaller(self, per):
        if keras.config.backend() == "torch":
            self.skipTest("Each call takes the shapes as they are.")

        def fit(jit_compile):
            keras.utils.set_random_seed(1)
            layer = MoE(
                router=ExpertChoiceRouter(4, capacity=7, per=per),
                experts=GLUExperts(4, 3),
            )
            x = keras.Input((None, 5))
            model = keras.Model(x, layer(x))
            model.compile("sgd", "mse", jit_compile=jit_compile)
            x, y = inputs(0, (5, 4, 5)), inputs(1, (5, 4, 5))
            model.fit(x, y, batch_size=3, shuffle=False, verbose=0)
            return model.predict(x, batch_size=3, verbose=0)

        self.assertAllClose(fit(True), fit(False), atol=1e-6)

    def test_rows_are_as_many_as_the_experts_take(self):
        seen = []

        class Counting(GLUExperts):
            def call(self, rows, group_sizes, training=None):
                seen.append(tuple(rows.shape))
                return super().call(rows, group_sizes, training=training)

        layer = MoE(router=ExpertChoiceRouter(4), experts=Counting(4, 3))
        layer(inputs())
        self.assertEqual(seen[-1], (24, 5))  # not 12 tokens times 4 experts
