import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import SubNetworkRouting
from tests.recommendation.gates.multi_gate_moe_test import inputs
from tests.test_case import TestCase


def make(units=None, **kwargs):
    layer = SubNetworkRouting(2, units, **kwargs)
    layer.build((None, 3, 4))
    layer.log_alpha.assign([[-4.0, 0.0, 1.0], [4.0, -0.5, 0.2]])
    return layer


def codes_of(layer):
    logits = ops.convert_to_numpy(layer.log_alpha)
    return np.clip(1.2 / (1 + np.exp(-logits)) - 0.1, 0, 1)


class SubNetworkRoutingTest(TestCase):
    def test_transform_and_average(self):
        x = inputs(5, 3, 4)
        layer = make()
        codes = codes_of(layer)
        self.assertEqual((codes[0, 0], codes[1, 0]), (0.0, 1.0))
        self.assert_relative(layer.codes(), codes)
        self.assert_relative(layer(x), np.einsum("oi,bid->bod", codes, x))
        layer = make(6)
        kernel = ops.convert_to_numpy(layer.kernel)
        wanted = np.einsum("oi,bid,oidu->bou", codes, x, kernel)
        self.assert_relative(layer(x), wanted)

    def test_drawn_codes(self):
        layer = make(l0_weight=0.5, seed=3)
        draws = np.stack(
            [ops.convert_to_numpy(layer.codes(True)) for _ in range(400)]
        )
        self.assertTrue(((draws >= 0) & (draws <= 1)).all())
        logits = ops.convert_to_numpy(layer.log_alpha)
        on = 1 / (1 + np.exp(-(logits - 0.9 * np.log(0.1 / 1.1))))
        self.assertAllClose((draws > 0).mean(0), on, atol=0.1)
        self.assertTrue((draws == 0).any() and (draws == 1).any())
        layer(inputs(5, 3, 4), training=True)
        (loss,) = layer.losses
        self.assertAllClose(loss, 0.5 * on.sum(), rtol=1e-5)

    def test_not_stochastic(self):
        layer = make(stochastic=False, l0_weight=0.5)
        x = inputs(5, 3, 4)
        wanted = ops.convert_to_numpy(layer(x))
        self.assert_relative(layer(x, training=True), wanted)
        self.assertEmpty(layer.non_trainable_variables)

    def test_a_connection_that_is_off_gets_no_gradient(self):
        _, d_x, d_weights = self.outputs_and_gradients(make(6), inputs(5, 3, 4))
        alpha = d_weights["log_alpha"]
        self.assertEqual((alpha == 0).tolist(), [[1, 0, 0], [1, 0, 0]])
        self.assertAllClose(d_weights["kernel"][0, 0], np.zeros((4, 6)))
        self.assertGreater(np.abs(d_x).min(), 0)

    @parameterized.parameters((None, 1, (2, 2, 4)), (6, 2, (2, 2, 6)))
    def test_layer_contract(self, units, weights, shape):
        self.run_layer_test(
            SubNetworkRouting,
            init_kwargs={"num_outputs": 2, "units": units},
            input_shape=(2, 3, 4),
            expected_output_shape=shape,
            expected_num_trainable_weights=weights,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=1,
            expected_num_losses=0,
            supports_masking=False,
        )

    def test_errors(self):
        for name in ("num_outputs", "units", "temperature"):
            with self.assertRaisesRegex(ValueError, f"`{name}` must"):
                SubNetworkRouting(**{"num_outputs": 2, name: 0})
        with self.assertRaisesRegex(ValueError, "`l0_weight` must"):
            SubNetworkRouting(2, l0_weight=-1)
        for kwargs in ({"low": 0.0}, {"high": 1.0}):
            with self.assertRaisesRegex(ValueError, "`low` must be below 0"):
                SubNetworkRouting(2, **kwargs)
        for shape in ((4, 3), (4, None, 3), (4, 3, None)):
            with self.assertRaisesRegex(ValueError, "static but for the batch"):
                SubNetworkRouting(2).build(shape)
