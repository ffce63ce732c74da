"""`AITMTransfer`, `CrossStitch` and `BalancedExperts`."""

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import AITMTransfer
from keras_moe.layers import BalancedExperts
from keras_moe.layers import CrossStitch
from tests.recommendation.gates.multi_gate_moe_test import inputs
from tests.test_case import TestCase


class AITMTransferTest(TestCase):
    @parameterized.product(
        share_attention=(True, False), attention_use_bias=(True, False)
    )
    def test_loop(self, **kwargs):
        layer = AITMTransfer(info_activation="tanh", **kwargs)
        x = inputs(4, 3, 5)
        y = ops.convert_to_numpy(layer(x))
        before = x[:, 0]
        self.assert_relative(y[:, 0], before)
        for step, info in enumerate(layer.infos):
            kernel, bias = map(ops.convert_to_numpy, (info.kernel, info.bias))
            handed = np.tanh(before @ kernel[0] + bias[0])
            at = 0 if layer.share_attention else step
            attention = layer.attentions[at]
            maps = ops.convert_to_numpy(attention.kernel)
            rows = []
            for row in (x[:, step + 1], handed):
                q, k, v = row @ maps[0], row @ maps[1], row @ maps[2]
                rows.append((np.exp((q * k).sum(-1) / 5**0.5), v))
            total = sum(score for score, _ in rows)
            before = sum((score / total)[:, None] * v for score, v in rows)
            self.assert_relative(y[:, step + 1], before)
        self.assertLen(layer.attentions, 1 if kwargs["share_attention"] else 2)

    def test_stopped_gradient(self):
        for stop in (False, True):
            layer = AITMTransfer(stop_gradient=stop, info_activation="tanh")
            cotangent = np.zeros((4, 3, 5), "float32")
            cotangent[:, 2] = 1.0
            layer.build((4, 3, 5))
            _, d_x, _ = self.outputs_and_gradients(
                layer, inputs(4, 3, 5), cotangent
            )
            reached = np.abs(d_x).max(axis=(0, 2)) > 0
            self.assertEqual(reached.tolist(), [not stop, not stop, True])

    def test_layer_contract(self):
        self.run_layer_test(
            AITMTransfer,
            init_kwargs={"info_normalization": "batch"},
            input_shape=(2, 3, 4),
            expected_output_shape=(2, 3, 4),
            expected_num_trainable_weights=10,
            expected_num_non_trainable_weights=4,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=False,
        )

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "`info_normalization` must"):
            AITMTransfer(info_normalization="layer")
        with self.assertRaisesRegex(ValueError, "`normalization_epsilon` mus"):
            AITMTransfer(normalization_epsilon=0)
        for shape in ((4, 3), (4, 1, 3), (4, None, 3), (4, 2, None)):
            with self.assertRaisesRegex(ValueError, "with two tasks or more"):
                AITMTransfer().build(shape)


class CrossStitchTest(TestCase):
    def test_shares(self):
        layer = CrossStitch(own=0.7)
        x = inputs(4, 3, 5)
        kernel = np.full((3, 3), 0.15) + 0.55 * np.eye(3)
        self.assert_relative(layer(x), np.einsum("ts,bsd->btd", kernel, x))
        self.assert_relative(layer.kernel, kernel)
        x = inputs(4, 1, 5)
        self.assert_relative(CrossStitch()(x), x)

    def test_layer_contract(self):
        self.run_layer_test(
            CrossStitch,
            init_kwargs={"own": 0.5},
            input_shape=(2, 3, 4),
            expected_output_shape=(2, 3, 4),
            expected_num_trainable_weights=1,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=False,
        )

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "`own` must"):
            CrossStitch(own="most")
        for shape in ((4, 3), (4, None, 3)):
            with self.assertRaisesRegex(ValueError, "static num_tasks"):
                CrossStitch().build(shape)


class BalancedExpertsTest(TestCase):
    def test_mix(self):
        layer = BalancedExperts()
        x, experts = inputs(4, 3, 5), inputs(4, 3, 5, seed=2)
        layer(x, experts)
        layer.balance_logit.assign(1.0)
        layer.weight_logit.assign(-0.5)
        balance, weight = 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(0.5))
        rest = experts.sum(1, keepdims=True) - experts
        mixed = balance * experts + (1 - balance) / 2 * rest
        self.assert_relative(layer(x, experts), x + weight * mixed)

    def test_one_expert(self):
        layer = BalancedExperts()
        x = inputs(4, 1, 5)
        self.assert_relative(layer(x, x), 1.5 * x)

    def test_config(self):
        layer = BalancedExperts(initializer="ones")
        copy = BalancedExperts.from_config(layer.get_config())
        self.assertEqual(copy.get_config(), layer.get_config())

    def test_errors(self):
        for shapes in (
            ((4, 3), (4, 3)),
            ((4, 3, 5), (4, 2, 5)),
            ((4, None, 5), (4, None, 5)),
        ):
            with self.assertRaisesRegex(ValueError, "the same shape"):
                BalancedExperts().build(*shapes)
