"""`GateNU`, `EPNet` and `PPNet`."""

import os

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import EPNet
from keras_moe.layers import GateNU
from keras_moe.layers import PPNet
from tests.recommendation.gates.multi_gate_moe_test import inputs
from tests.test_case import TestCase


def gate(layer, x, number=0):
    """What a `GateNU` gives, in NumPy."""
    hidden, output = (
        [ops.convert_to_numpy(v)[number] for v in (dense.kernel, dense.bias)]
        for dense in (layer.hidden, layer.output_dense)
    )
    h = np.maximum(x @ hidden[0] + hidden[1], 0)
    return layer.scale / (1 + np.exp(-(h @ output[0] + output[1])))


class GateNUTest(TestCase):
    def test_factors(self):
        layer = GateNU(3, hidden_units=4, scale=1.5)
        x = inputs(5, 6)
        self.assert_relative(layer(x), gate(layer, x))
        layer = GateNU(3, num_gates=2)
        y = ops.convert_to_numpy(layer(x))
        wanted = np.stack([gate(layer, x, n) for n in (0, 1)], axis=1)
        self.assert_relative(y, wanted)
        self.assertEqual(layer.hidden.units, 3)

    def test_layer_contract(self):
        for number, shape in ((None, (2, 3)), (4, (2, 4, 3))):
            self.run_layer_test(
                GateNU,
                init_kwargs={"units": 3, "num_gates": number},
                input_shape=(2, 5),
                expected_output_shape=shape,
                expected_num_trainable_weights=4,
                expected_num_non_trainable_weights=0,
                expected_num_seed_generators=0,
                expected_num_losses=0,
                supports_masking=False,
            )

    def test_errors(self):
        for name in ("units", "hidden_units", "num_gates", "scale"):
            with self.assertRaisesRegex(ValueError, f"`{name}` must"):
                GateNU(**{"units": 3, name: 0})
        with self.assertRaisesRegex(ValueError, r"input_shape=\(4, 5, 6\)"):
            GateNU(3).build((4, 5, 6))


class EPNetTest(TestCase):
    def test_output_and_stopped_gradient(self):
        layer = EPNet(hidden_units=3)
        x, domain = inputs(5, 4), inputs(5, 2, seed=2)
        layer(x, domain)
        factors = gate(layer.gate, np.concatenate([domain, x], axis=1))
        cotangent = inputs(5, 4, seed=3)
        y, d_x, _ = self.outputs_and_gradients(
            layer, x, cotangent, domain=ops.convert_to_tensor(domain)
        )
        self.assert_relative(y, x * factors)
        # Nothing comes back through the gate.
        self.assert_relative(d_x, cotangent * factors)
        self.assert_relative(layer.factors(x, domain), factors)

    def test_errors(self):
        for name in ("hidden_units", "scale"):
            with self.assertRaisesRegex(ValueError, f"`{name}` must"):
                EPNet(**{name: 0})
        with self.assertRaisesRegex(ValueError, r"domain_shape=\(4, 2, 2\)"):
            EPNet().build((4, 5), (4, 2, 2))


class PPNetTest(TestCase):
    @parameterized.product(
        gate_place=("output", "input"),
        gate_reads=("prior_and_inputs", "prior"),
        output_units=(None, 2),
    )
    def test_loop(self, gate_place, gate_reads, output_units):
        layer = PPNet(
            2,
            [5, 3],
            output_units=output_units,
            gate_units=4,
            gate_place=gate_place,
            gate_reads=gate_reads,
        )
        x, prior = inputs(6, 4), inputs(6, 3, seed=2)
        y = ops.convert_to_numpy(layer(x, prior))
        known = prior
        if gate_reads == "prior_and_inputs":
            known = np.concatenate([prior, x], axis=1)
        for task in range(2):
            h = x
            for number, dense in enumerate(layer.layers):
                is_hidden = number < 2
                gated = is_hidden or gate_place == "input"
                factors = 1.0
                if gated:
                    factors = gate(layer.gates[number], known, task)
                h = h * factors if gate_place == "input" else h
                h = h @ ops.convert_to_numpy(dense.kernel)[task]
                h = h + ops.convert_to_numpy(dense.bias)[task]
                h = np.maximum(h, 0) if is_hidden else h
                h = h * factors if gate_place == "output" else h
            self.assert_relative(y[:, task], h)
        self.assertEqual(
            layer.compute_output_shape(x.shape, prior.shape), y.shape
        )

    def test_the_gates_train_no_inputs(self):
        layer = PPNet(2, [5])
        layer.build((None, 4), (None, 3))
        kernel = layer.layers[0].kernel
        kernel.assign(np.zeros(kernel.shape))
        _, d_x, _ = self.outputs_and_gradients(
            layer, inputs(6, 4), prior=ops.convert_to_tensor(inputs(6, 3))
        )
        self.assertAllClose(d_x, np.zeros((6, 4)))

    def test_saving(self):
        x, prior = keras.Input((4,)), keras.Input((3,))
        scaled = EPNet()(x, prior)
        y = PPNet(2, [5], output_units=1, normalization="batch")(scaled, prior)
        model = keras.Model([x, prior], y)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        batch = [inputs(6, 4), inputs(6, 3)]
        self.assert_relative(loaded(batch), ops.convert_to_numpy(model(batch)))

    def test_errors(self):
        for name in ("num_tasks", "output_units", "gate_units", "scale"):
            with self.assertRaisesRegex(ValueError, f"`{name}` must"):
                PPNet(**{"num_tasks": 2, "units": 3, name: 0})
        for name in ("gate_place", "gate_reads", "normalization"):
            with self.assertRaisesRegex(ValueError, f"`{name}` must .*'x'"):
                PPNet(2, 3, **{name: "x"})
        with self.assertRaisesRegex(ValueError, "`units` must"):
            PPNet(2, [])
        with self.assertRaisesRegex(ValueError, r"prior_shape=\(4, None\)"):
            PPNet(2, 3).build((4, 5), (4, None))


class FactorsTest(TestCase):
    def test_before_the_layer_is_called(self):
        x, known = inputs(5, 6), inputs(5, 2, seed=2)
        layer = EPNet(4)
        factors = layer.factors(x, known)
        self.assert_relative(layer(x, known), x * ops.convert_to_numpy(factors))
        self.assertEqual(tuple(factors.shape), (5, 6))
        layer = PPNet(2, [3])
        (factors, *_) = layer.factors(x, known)
        self.assertEqual(tuple(factors.shape)[:2], (5, 2))
