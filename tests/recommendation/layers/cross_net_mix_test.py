import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import CrossNetMix
from tests.recommendation.gates.multi_gate_moe_test import inputs
from tests.test_case import TestCase


def loop(layer, x0, x):
    """One example, layer and expert after the other."""
    weights = {v.name: ops.convert_to_numpy(v) for v in layer.weights}
    outputs = []
    for first, now in zip(x0, x, strict=True):
        for number in range(layer.num_layers):
            gate = 0 if layer.share_gates else number
            logits = now @ weights["gate_kernel"][gate]
            if layer.gate_use_bias:
                logits = logits + weights["gate_bias"][gate]
            shares = np.exp(logits) / np.exp(logits).sum()
            new = now
            for e, share in enumerate(shares):
                h = np.tanh(now @ weights["down_kernel"][number, e])
                h = np.tanh(h @ weights["middle_kernel"][number, e])
                h = h @ weights["up_kernel"][number, e]
                new = new + share * first * (h + weights["bias"][number])
            now = new
        outputs.append(now)
    return np.array(outputs)


class CrossNetMixTest(TestCase):
    @parameterized.product(
        share_gates=(True, False), gate_use_bias=(True, False)
    )
    def test_loop(self, **kwargs):
        layer = CrossNetMix(
            3,
            num_experts=2,
            num_layers=3,
            bias_initializer="random_normal",
            **kwargs,
        )
        x0, x = inputs(4, 5), inputs(4, 5, seed=2)
        self.assert_relative(layer(x0), loop(layer, x0, x0))
        self.assert_relative(layer(x0, x), loop(layer, x0, x))
        gates = ops.convert_to_numpy(layer.gates(x0, x))
        self.assertAllClose(gates.sum(-1), np.ones(4), atol=1e-5)
        logits = x @ ops.convert_to_numpy(layer.gate_kernel)[0]
        if layer.gate_bias is not None:
            logits = logits + ops.convert_to_numpy(layer.gate_bias)[0]
        self.assertAllClose(gates.argmax(-1), logits.argmax(-1))

    def test_one_example(self):
        layer = CrossNetMix(3)
        self.assertEqual(layer(inputs(1, 5)).shape, (1, 5))

    def test_one_by_one(self):
        whole = CrossNetMix(3, num_experts=2, num_layers=2)
        x0 = inputs(4, 5)
        wanted = ops.convert_to_numpy(whole(x0))
        x = x0
        for number in range(2):
            layer = CrossNetMix(3, num_experts=2)
            layer.build(x0.shape)
            for ours, theirs in zip(layer.weights, whole.weights, strict=True):
                ours.assign(theirs[number : number + 1])
            x = layer(x0, x)
        self.assert_relative(x, wanted)

    def test_experts_differ_at_the_start(self):
        layer = CrossNetMix(3, num_layers=2)
        layer.build((None, 3))
        for name in ("down", "middle", "up"):
            kernel = getattr(layer, f"{name}_kernel")
            banks = ops.convert_to_numpy(kernel).reshape(8, 9)
            self.assertLen(np.unique(banks.round(5), axis=0), 8)
            limit = 1.0 + 1e-6  # of Glorot's draw of 3 by 3
            self.assertLessEqual(np.abs(banks).max(), limit)
            self.assertGreater(np.abs(banks).max(), 0.8)

    def test_layer_contract(self):
        self.run_layer_test(
            CrossNetMix,
            init_kwargs={"projection_dim": 3, "gate_use_bias": True},
            input_shape=(2, 5),
            expected_output_shape=(2, 5),
            expected_num_trainable_weights=6,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=False,
        )

    def test_gates_under_mixed_precision(self):
        layer = CrossNetMix(3, gate_use_bias=True, dtype="mixed_bfloat16")
        x0, x = inputs(5, 4), inputs(5, 4) + 1
        gates = layer.gates(x0, x)  # Builds it.
        again = CrossNetMix(3, gate_use_bias=True)
        again.build((5, 4))
        again.set_weights(layer.get_weights())
        self.assertAllClose(gates, again.gates(x0, x), atol=1e-6)

    def test_errors(self):
        for name in ("projection_dim", "num_experts", "num_layers"):
            with self.assertRaisesRegex(ValueError, f"`{name}` must"):
                CrossNetMix(**{name: 0})
        for shapes in (
            ((4, None),),
            ((4, 5, 6),),
            ((4, 5), (4, 6)),
            ((4, 5), (4, 5, 5)),
        ):
            with self.assertRaisesRegex(ValueError, "`x0` and `x` must"):
                CrossNetMix().build(*shapes)
