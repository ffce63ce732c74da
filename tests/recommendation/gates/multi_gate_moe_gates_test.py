"""The gates of `MultiGateMoE`."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MultiGateMoE
from keras_moe.routers import DSelectKRouter
from tests.recommendation.gates.multi_gate_moe_test import inputs
from tests.recommendation.gates.multi_gate_moe_test import make
from tests.test_case import TestCase

UNITS = {"num_task_experts": [1, 2], "num_shared_experts": 2}
SEEN = np.array([[1, 0, 0, 1, 1], [0, 1, 1, 1, 1]], "bool")


def logits_of(layer, x):
    """`(B, G, E)`, with minus infinity for what a gate does not see."""
    gates = layer.task_gates
    rows = x @ ops.convert_to_numpy(gates.kernel).T
    rows = rows + ops.convert_to_numpy(gates.bias)
    logits = np.full((len(x), *SEEN.shape), -np.inf)
    logits[:, SEEN] = rows
    return logits


class GatesTest(TestCase):
    @parameterized.parameters("softmax", "sparsemax", "entmax15", "top_k")
    def test_weights_sum_to_one_over_what_is_seen(self, activation):
        layer = make(gate_activation=activation, **UNITS)
        gates = ops.convert_to_numpy(layer.gates(inputs(40, 6)))
        self.assertAllClose(gates.sum(-1), np.ones((40, 2)), atol=1e-5)
        self.assertTrue((gates >= 0).all())
        self.assertTrue((gates[:, ~SEEN] == 0).all())
        if activation != "softmax":
            self.assertTrue((gates[:, SEEN] == 0).any())

    def test_sparsemax(self):
        layer = make(gate_activation="sparsemax", **UNITS)
        x = inputs(20, 6)
        logits = logits_of(layer, x)
        gates = ops.convert_to_numpy(layer.gates(x))
        # Those above the threshold are all as far above it as they weigh.
        for row, weights in zip(
            logits.reshape(-1, 5), gates.reshape(-1, 5), strict=True
        ):
            on = weights > 0
            threshold = (row[on].sum() - 1) / on.sum()
            self.assertAllClose(
                np.maximum(row - threshold, 0), weights, atol=1e-5
            )

    def test_top_k(self):
        layer = make(gate_activation="top_k", gate_top_k=2, **UNITS)
        x = inputs(20, 6)
        logits = logits_of(layer, x)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        least = np.sort(logits, axis=-1)[..., -2:-1]
        shares = np.where(logits >= least, shares, 0)
        shares = shares / shares.sum(-1, keepdims=True)
        self.assert_relative(layer.gates(x), shares)

    def test_function(self):
        layer = make(gate_activation="sigmoid", **UNITS)
        x = inputs(20, 6)
        wanted = 1 / (1 + np.exp(-logits_of(layer, x)))
        self.assert_relative(layer.gates(x), wanted)
        layer = make(gate_activation=lambda x: ops.tanh(x) + 2, **UNITS)
        wanted = np.where(SEEN, np.tanh(logits_of(layer, x)) + 2, 0)
        self.assert_relative(layer.gates(x), wanted)

    def test_temperature(self):
        x = inputs(20, 6)
        for temperature in (0.1, 10.0):
            layer = make(gate_temperature=temperature, **UNITS)
            logits = logits_of(layer, x) / temperature
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            shares = shares / shares.sum(-1, keepdims=True)
            self.assert_relative(layer.gates(x), shares)

    def test_batch_normalization(self):
        layer = MultiGateMoE(
            2, [3], gate_normalization="batch", return_gates=True, **UNITS
        )
        x = inputs(50, 6)
        _, gates = layer(x, training=True)
        logits = logits_of(layer, x)[:, SEEN]
        logits = (logits - logits.mean(0)) / np.sqrt(logits.var(0) + 1e-3)
        wide = np.full((50, *SEEN.shape), -np.inf)
        wide[:, SEEN] = logits
        shares = np.exp(wide)
        shares = shares / shares.sum(-1, keepdims=True)
        self.assert_relative(gates, shares, 1e-4)
        self.assertLen(layer.non_trainable_variables, 2)

    def test_dropout(self):
        layer = make(gate_dropout=0.5, return_gates=True, seed=1, **UNITS)
        x = inputs(400, 6)
        full = ops.convert_to_numpy(layer.gates(x))
        outputs, gates = layer(x, training=True)
        gates = ops.convert_to_numpy(gates)
        self.assertAllClose(gates.sum(-1), np.ones((400, 2)), atol=1e-5)
        kept = gates > 0
        self.assertBetween(kept[:, SEEN].mean(), 0.45, 0.75)
        # The kept ones stay in proportion.
        ratio = np.where(kept, gates / np.where(kept, full, 1), np.nan)
        spread = np.nanmax(ratio, -1) / np.nanmin(ratio, -1)
        self.assertAllClose(spread, np.ones((400, 2)), atol=1e-4)
        # Where all would be dropped, none is.
        layer = make(1, gate_dropout=0.99, return_gates=True)
        gates = ops.convert_to_numpy(layer(x, training=True)[1])
        whole = ops.convert_to_numpy(layer.gates(x))
        same = (np.abs(gates - whole) < 1e-6).all(axis=(1, 2))
        self.assertGreater(same.mean(), 0.9)
        _, gates = layer(x)
        self.assert_relative(gates, whole)

    def test_dropout_of_weights_of_either_sign(self):
        layer = make(
            gate_dropout=0.3,
            gate_activation="tanh",
            return_gates=True,
            seed=1,
            **UNITS,
        )
        x = inputs(400, 6)
        full = ops.convert_to_numpy(layer.gates(x))
        gates = ops.convert_to_numpy(layer(x, training=True)[1])
        kept = gates != 0
        self.assertBetween(kept[:, SEEN].mean(), 0.65, 0.75)
        self.assert_relative(gates[kept], full[kept] / 0.7)

    def test_dtype_of_returned_gates(self):
        layer = make(return_gates=True, dtype="mixed_bfloat16", **UNITS)
        x = inputs(4, 6)
        said = layer(keras.Input((6,)))
        found = layer(x)
        for one, other in zip(said, found, strict=True):
            self.assertDType(other, one.dtype)
            self.assertEqual(tuple(one.shape[1:]), tuple(other.shape[1:]))

    def test_seeds_of_what_is_drawn_at_the_start(self):
        for kwargs in (
            {"self_residual": "weights"},
            {"gate_activation": "dselect_k"},
        ):
            first, second = (
                MultiGateMoE(2, [4], 2, num_task_experts=3, seed=5, **kwargs)
                for _ in range(2)
            )
            first.build((None, 6))
            second.build((None, 6))
            part = first.residual or first.task_gates.selectors
            again = second.residual or second.task_gates.selectors
            drawn = [ops.convert_to_numpy(v) for v in part.trainable_weights]
            for one, other in zip(drawn, again.trainable_weights, strict=True):
                self.assertAllClose(other, one)
            # And no two of them begin alike.
            starts = {round(float(value.flat[0]), 7) for value in drawn}
            self.assertLen(starts, len(drawn))

    def test_unused_codes(self):
        losses = []
        for weight in (1.0, 0.5, 0.0):
            layer = MultiGateMoE(
                1,
                [4],
                6,
                gate_activation="dselect_k",
                gate_unused_code_weight=weight,
                seed=5,
            )
            layer(inputs(5, 6), training=True)
            losses.append(
                sum(float(ops.convert_to_numpy(x)) for x in layer.losses)
            )
        # At the start all eight codes are used alike, six of them by experts.
        np.testing.assert_allclose(losses, [2 * 8 / 6, 8 / 6, 0], rtol=0.01)

    @parameterized.parameters(1, 2, 3, 4, 5)
    def test_selectors_are_those_of_routers(self, num_experts):
        top_k = min(2, num_experts)
        layer = MultiGateMoE(
            2,
            [3],
            num_experts,
            gate_activation="dselect_k",
            gate_top_k=top_k,
            gate_entropy_weight=0.3,
            gate_gamma=0.7,
            return_gates=True,
        )
        x = inputs(7, 6) * 0.3
        layer.build(x.shape)
        rng = np.random.default_rng(0)
        selectors = layer.task_gates.selectors
        for variable in selectors.trainable_variables:
            variable.assign(rng.normal(size=variable.shape) * 0.5)
        _, gates = layer(x, training=True)
        losses = [float(ops.convert_to_numpy(loss)) for loss in layer.losses]
        wanted, penalties = [], 0.0
        for gate in range(2):
            router = DSelectKRouter(
                num_experts, top_k=top_k, gamma=0.7, entropy_weight=0.3
            )
            router.build((None, 6))
            for variable in router.trainable_variables:
                bank = getattr(selectors, variable.name)
                variable.assign(bank[gate])
            wanted.append(ops.convert_to_numpy(router(x, training=True).probs))
            penalties += sum(
                float(ops.convert_to_numpy(loss)) for loss in router.losses
            )
        self.assert_relative(gates, np.stack(wanted, axis=1))
        self.assertAllClose(sum(losses), penalties, rtol=1e-4)

    def test_selectors_of_what_is_seen(self):
        layer = MultiGateMoE(
            2,
            [3],
            num_shared_experts=1,
            num_task_experts=[1, 3],
            gate_activation="dselect_k",
            gate_top_k=1,
        )
        gates = ops.convert_to_numpy(layer.gates(inputs(7, 6)))
        # Both see a power of two, so that nothing is lost.
        self.assertAllClose(gates.sum(-1), np.ones((7, 2)), atol=1e-6)
        self.assertTrue((gates[:, 0, [1, 2, 3]] == 0).all())
        self.assertTrue((gates[:, 1, 0] == 0).all())
