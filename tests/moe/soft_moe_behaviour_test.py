"""`SoftMoE` under masks, other ranks and precisions."""

from unittest import mock

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.moe.soft_moe import SoftMoE
from tests.moe.soft_moe_test import make
from tests.moe.soft_moe_test import soft_moe
from tests.moe.soft_moe_test import weights_of
from tests.routers.soft_router_test import SHAPE
from tests.routers.soft_router_test import inputs
from tests.test_case import TestCase


class BehaviourTest(TestCase):
    def test_permuted_tokens_permute_the_output(self):
        layer, x = make(), inputs()
        order = [2, 0, 3, 1]
        outputs = ops.convert_to_numpy(layer(x))
        self.assertAllClose(layer(x[:, order]), outputs[:, order], atol=1e-6)
        self.assertNotAllClose(outputs[:, order], outputs)

    def test_examples_do_not_touch_each_other(self):
        layer, x = make(), inputs()
        outputs = ops.convert_to_numpy(layer(x))
        x[1, 2, 3] = np.nan
        spoilt = ops.convert_to_numpy(layer(x))
        self.assertAllClose(spoilt[0], outputs[0], atol=1e-6)
        self.assertTrue(np.isnan(spoilt[1]).all())

    def test_masked_tokens_change_nothing(self):
        layer = make("mlp")
        alone = self.outputs_and_gradients(layer, inputs())
        mask = np.arange(7) < 4
        for junk in (0.0, 1e3, np.nan):
            x = np.full((2, 7, 5), junk, "float32")
            x[:, :4] = inputs()
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                layer, x, mask=ops.array(np.stack([mask, mask]))
            )
            self.assertAllClose(outputs[:, :4], alone[0], atol=1e-6)
            self.assertAllClose(d_inputs[:, :4], alone[1], atol=1e-5)
            self.assertAllEqual(outputs[:, 4:], np.zeros((2, 3, 5)))
            self.assertAllEqual(d_inputs[:, 4:], np.zeros((2, 3, 5)))
            for name, gradient in d_weights.items():
                self.assertAllClose(gradient, alone[2][name], atol=1e-5)

    def test_all_masked_and_empty(self):
        layer = make("mlp")
        x = np.full(SHAPE, np.nan, "float32")
        x[1] = inputs()[1]
        mask = np.repeat([[False], [True]], 4, axis=1)
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer, x, mask=ops.array(mask)
        )
        self.assertAllEqual(outputs[0], np.zeros((4, 5)))
        self.assertAllClose(outputs[1], layer(inputs())[1], atol=1e-6)
        self.assertAllEqual(d_inputs[0], np.zeros((4, 5)))
        for gradient in d_weights.values():
            self.assertTrue(np.isfinite(gradient).all())
        for shape in ((0, 4, 5), (2, 3, 0, 5)):
            outputs = layer(np.zeros(shape, "float32"))
            self.assertEqual(tuple(outputs.shape), shape)

    def test_one_token_one_expert_one_slot(self):
        layer = SoftMoE(num_experts=1, intermediate_dim=3)
        x = inputs(shape=(2, 1, 5))
        rows = layer(x)
        alone = layer.experts(x[:, 0], ops.array([2], "int32"))
        self.assertAllClose(rows[:, 0], alone, atol=1e-6)

    def test_positions_of_an_image(self):
        layer = make()
        x = inputs(shape=(2, 2, 3, 5))
        flat = x.reshape(2, 6, 5)
        self.assertAllClose(
            layer(x), ops.reshape(layer(flat), x.shape), atol=1e-6
        )
        mask = np.array([[True, False], [True, True]])  # whole lines
        outputs = ops.convert_to_numpy(layer(x, mask=ops.array(mask)))
        full = np.repeat(mask, 3, axis=1)
        self.assertAllClose(
            outputs.reshape(2, 6, 5), layer(flat, mask=ops.array(full))
        )
        self.assertAllEqual(outputs[0, 1], np.zeros((3, 5)))
        self.assertGreater(np.abs(outputs[mask]).min(), 0)

    def test_mask_arrives_from_an_embedding_and_passes_on(self):
        model = keras.Sequential(
            [
                keras.layers.Embedding(10, 8, mask_zero=True),
                SoftMoE(num_experts=3, intermediate_dim=2),
                keras.layers.GlobalAveragePooling1D(),
            ]
        )
        short = model.predict(np.array([[3, 4]]), verbose=0)
        padded = model.predict(np.array([[3, 4, 0, 0, 0]]), verbose=0)
        self.assertAllClose(short, padded, atol=1e-6)

    def test_integer_inputs(self):
        x = np.arange(40).reshape(SHAPE) % 3
        self.assertAllClose(make()(x), make()(x.astype("float32")))

    @parameterized.parameters("mixed_float16", "mixed_bfloat16", "float64")
    def test_precision(self, dtype):
        if dtype == "float64" and keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 unless told so as it starts.")
        layer = make(dtype=dtype)
        outputs = layer(inputs())
        self.assertDType(outputs, layer.compute_dtype)
        wanted = soft_moe(inputs(), weights_of(layer))
        tolerance = {"f": 3e-3, "b": 3e-2}[layer.compute_dtype[0]]
        tolerance = 1e-9 if dtype == "float64" else tolerance
        outputs = ops.convert_to_numpy(outputs).astype("float64")
        self.assert_relative(outputs, wanted, tolerance)

    def test_mixes_in_float32(self):
        # 4096 weights of 1 / 4096, and no operand in half precision.
        layer = make(dtype="mixed_float16")
        x = np.repeat(inputs(shape=(1, 1, 5)), 4096, axis=1) + 1
        with mock.patch.object(ops, "einsum", wraps=ops.einsum) as einsum:
            outputs = layer(x)
        mixed = [c.args[1:] for c in einsum.mock_calls if "bepd" in c.args[0]]
        self.assertLen(mixed, 2)
        for operand in (*mixed[0], *mixed[1]):
            self.assertDType(operand, "float32")
        outputs = ops.convert_to_numpy(outputs).astype("float32")
        one = soft_moe(x[:, :1], weights_of(layer))
        self.assertAllClose(outputs[:, :1], one, atol=3e-3)
        self.assertAllEqual(outputs, np.repeat(outputs[:, :1], 4096, axis=1))
