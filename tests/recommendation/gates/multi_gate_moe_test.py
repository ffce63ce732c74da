"""What `MultiGateMoE` computes."""

import time

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import MultiGateMoE
from tests.recommendation.gates.multi_gate_loop import loop
from tests.test_case import TestCase

CASES = {
    "mmoe": {"num_shared_experts": 3},
    "deep": {"expert_units": [4, 5], "gate_units": [3], "gate_use_bias": False},
    "cgc": {"num_task_experts": 2, "num_shared_experts": 1},
    "unequal": {"num_task_experts": [0, 3], "num_shared_experts": 2},
    "ple": {"num_task_experts": 2, "output_shared": True},
    "shared_of_shared": {
        "num_task_experts": [1, 2],
        "output_shared": True,
        "shared_sees": "shared",
    },
    "adatt_sp": {
        "num_task_experts": [1, 2],
        "num_shared_experts": 0,
        "visibility": "all",
        "self_residual": "weights",
    },
    "adatt_of_one": {
        "num_task_experts": 1,
        "num_shared_experts": 1,
        "visibility": "all",
        "self_residual": "weights",
        "output_shared": True,
    },
    "home": {
        "num_task_experts": [1, 2],
        "self_residual": "gates",
        "feature_gate_rank": 2,
        "output_shared": True,
    },
    "no_experts_of_its_own": {
        "num_task_experts": [0, 1],
        "self_residual": "gates",
    },
    "matrix": {
        "num_task_experts": 1,
        "num_shared_experts": 2,
        "visibility": [[1, 0, 0, 1], [1, 1, 1, 0]],
        "gate_temperature": 0.5,
    },
}
NAMED = [(name, kwargs) for name, kwargs in CASES.items()]


def make(num_tasks=2, shape=(None, 6), **kwargs):
    """A built layer, with weights that are not zero where they start so."""
    layer = MultiGateMoE(
        num_tasks,
        **{"expert_units": [4], "num_shared_experts": 2, **kwargs},
    )
    layer.build(shape)
    rng = np.random.default_rng(0)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * 0.7)
    return layer


def inputs(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


class MultiGateMoETest(TestCase):
    @parameterized.named_parameters(NAMED)
    def test_loop(self, kwargs):
        layer = make(**kwargs)
        x = inputs(5, 6)
        outputs, gates = loop(layer, x)
        self.assert_relative(layer(x), outputs)
        self.assert_relative(layer.gates(x), gates)
        self.assertEqual(
            layer.compute_output_shape((5, 6)), tuple(outputs.shape)
        )

    @parameterized.named_parameters(NAMED)
    def test_slots(self, kwargs):
        slots = 2 if kwargs.get("num_shared_experts") == 0 else 3
        layer = make(shape=(None, slots, 6), **kwargs)
        x = inputs(5, slots, 6)
        outputs, gates = loop(layer, x)
        self.assert_relative(layer(x), outputs)
        self.assert_relative(layer.gates(x), gates)

    def test_slots_and_gate_inputs_of_their_own(self):
        layer = MultiGateMoE(
            2, [4], num_shared_experts=3, expert_slots=[2, 0, 0]
        )
        x, g = inputs(5, 3, 6), inputs(5, 7, seed=2)
        y = layer(x, gate_inputs=g)
        outputs, gates = loop(layer, x, g)
        self.assert_relative(y, outputs)
        self.assert_relative(layer.gates(x, g), gates)
        g = inputs(5, 2, 6, seed=3)  # one for each gate
        layer = make(shape=(None, 6))
        self.assert_relative(
            layer(inputs(5, 6), gate_inputs=g), loop(layer, inputs(5, 6), g)[0]
        )

    def test_shared_slot_of_gates(self):
        layer = make(
            shape=(None, 3, 6),
            num_task_experts=2,
            visibility="all",
            gate_input="slot_plus_shared",
            output_shared=True,
        )
        x = inputs(5, 3, 6)
        self.assert_relative(layer(x), loop(layer, x)[0])

    def test_gradients_of_weights(self):
        layer = make(num_task_experts=[1, 2], self_residual="weights")
        x, cotangent = inputs(5, 6), inputs(5, 2, 4, seed=2)
        _, d_x, d_weights = self.outputs_and_gradients(layer, x, cotangent)
        step = 1e-3
        for variable in layer.trainable_variables:
            value = np.array(ops.convert_to_numpy(variable))
            direction = inputs(*value.shape, seed=3)
            sums = []
            for sign in (1, -1):
                variable.assign(value + sign * step * direction)
                sums.append((loop(layer, x)[0] * cotangent).sum())
            variable.assign(value)
            gradient = d_weights[variable.path.split("/", 1)[1]]
            self.assertAllClose(
                (gradient * direction).sum(),
                (sums[0] - sums[1]) / (2 * step),
                rtol=3e-2,
                atol=3e-3,
            )
        self.assertEqual(d_x.shape, x.shape)

    def test_identity_experts(self):
        layer = make(
            expert_units=(),
            num_task_experts=1,
            num_shared_experts=0,
            visibility="all",
            shape=(None, 2, 6),
        )
        x = inputs(4, 2, 6)
        gates = ops.convert_to_numpy(layer.gates(x))
        self.assert_relative(layer(x), np.einsum("bge,bed->bgd", gates, x))

    def test_one_task_one_expert(self):
        layer = make(1, num_shared_experts=1)
        x = inputs(3, 6)
        self.assert_relative(layer.gates(x), np.ones((3, 1, 1)))
        self.assert_relative(layer(x), loop(layer, x)[0])

    def test_examples_are_apart(self):
        layer = make(num_task_experts=1, output_shared=True)
        x = inputs(4, 6)
        clean = ops.convert_to_numpy(layer(x))
        x[1] = np.nan
        outputs = ops.convert_to_numpy(layer(x))
        self.assertAllClose(outputs[[0, 2, 3]], clean[[0, 2, 3]])
        self.assertTrue(np.isnan(outputs[1]).all())

    def test_experts_differ_at_the_start(self):
        for initializer in ("glorot_uniform", keras.initializers.HeNormal(1)):
            layer = MultiGateMoE(
                2,
                [6, 6],
                num_task_experts=2,
                kernel_initializer=initializer,
                gate_initializer=initializer,
            )
            layer.build((None, 6))
            kernels = [
                kernel
                for dense in layer.experts.layers
                for kernel in ops.convert_to_numpy(dense.kernel)
            ]
            kernels += list(ops.convert_to_numpy(layer.task_gates.kernel))
            for i, first in enumerate(kernels):
                self.assertGreater(np.abs(first).max(), 0)
                for second in kernels[:i]:
                    if first.shape == second.shape:
                        self.assertGreater(np.abs(first - second).max(), 1e-3)

    def test_fans_are_those_of_one_expert(self):
        layer = MultiGateMoE(2, [50], num_shared_experts=30)
        layer.build((None, 50))
        limit = (6 / 100) ** 0.5
        kernel = np.abs(ops.convert_to_numpy(layer.experts.layers[0].kernel))
        self.assertBetween(kernel.max(), 0.98 * limit, limit)
        kernel = np.abs(ops.convert_to_numpy(layer.task_gates.kernel))
        limit = (6 / 80) ** 0.5
        self.assertBetween(kernel.max(), 0.98 * limit, limit)

    def test_no_weights_for_what_a_gate_does_not_see(self):
        layer = MultiGateMoE(2, [3], 4, num_task_experts=4, output_shared=True)
        layer.build((None, 10))
        self.assertEqual(layer.task_gates.kernel.shape, (8 + 8 + 12, 10))
        self.assertEqual(layer.count_params(), 12 * 11 * 3 + 28 * 11)

    def test_many_experts_and_tasks_build_in_seconds(self):
        start = time.monotonic()
        layer = MultiGateMoE(20, [32, 16], num_shared_experts=64)
        x = keras.Input((40,))
        model = keras.Model(x, layer(x))
        self.assertEqual(model.output.shape, (None, 20, 16))
        self.assertLess(time.monotonic() - start, 20)
        self.assertLen(model.trainable_variables, 6)


class StoppedGradientsTest(TestCase):
    def gradient_of_experts(self, task, **kwargs):
        layer = make(
            num_task_experts=1,
            num_shared_experts=1,
            visibility="all",
            output_shared=True,
            **kwargs,
        )
        x = np.abs(inputs(5, 6)) + 0.1
        for dense in layer.experts.layers:  # no unit is off
            dense.kernel.assign(np.abs(ops.convert_to_numpy(dense.kernel)))
            dense.bias.assign(np.abs(ops.convert_to_numpy(dense.bias)))
        cotangent = np.zeros((5, 3, 4), "float32")
        cotangent[:, task] = inputs(5, 4)
        y, _, d_weights = self.outputs_and_gradients(layer, x, cotangent)
        self.assert_relative(y, loop(layer, x)[0])
        kernel = np.abs(d_weights["experts/dense_0/kernel"]).max(axis=(1, 2))
        gates = d_weights["gates/kernel"].reshape(3, 3, 6)
        self.assertTrue((np.abs(gates[task]).max(axis=-1) > 0).all())
        return (kernel > 0).tolist()

    def test_only_a_task_s_gate_stops(self):
        for task in range(3):
            found = self.gradient_of_experts(task)
            self.assertEqual(found, [True] * 3)
        stop = {"stop_cross_task_gradients": True}
        self.assertEqual(self.gradient_of_experts(0, **stop), [1, 0, 1])
        self.assertEqual(self.gradient_of_experts(1, **stop), [0, 1, 1])
        # The shared unit learns from all.
        self.assertEqual(self.gradient_of_experts(2, **stop), [1, 1, 1])


class ExpertsTest(TestCase):
    def test_batch_normalization_of_each_expert(self):
        for place in ("before_activation", "after_activation"):
            layer = MultiGateMoE(
                1,
                [4],
                num_shared_experts=2,
                expert_normalization="batch",
                expert_normalization_place=place,
                return_gates=True,
            )
            x = inputs(50, 6)
            outputs, gates = layer(x, training=True)
            dense = layer.experts.layers[0]
            h = np.einsum("bd,edf->bef", x, ops.convert_to_numpy(dense.kernel))
            relu = place == "after_activation"
            h = np.maximum(h, 0) if relu else h
            h = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-3)
            h = h if relu else np.maximum(h, 0)
            wanted = np.einsum("bge,bef->bgf", ops.convert_to_numpy(gates), h)
            self.assert_relative(outputs, wanted, 1e-4)

    def test_layer_normalization_of_each_expert(self):
        layer = make(expert_normalization="layer", return_gates=True)
        x = inputs(5, 6)
        outputs, gates = layer(x)
        dense = layer.experts.layers[0]
        h = np.einsum("bd,edf->bef", x, ops.convert_to_numpy(dense.kernel))
        h = h + ops.convert_to_numpy(dense.bias)
        h = h - h.mean(-1, keepdims=True)
        h = h / np.sqrt(h.var(-1, keepdims=True) + 1e-3)
        gamma, beta = map(ops.convert_to_numpy, (dense.gamma, dense.beta))
        h = np.maximum(h * gamma + beta, 0)
        wanted = np.einsum("bge,bef->bgf", ops.convert_to_numpy(gates), h)
        self.assert_relative(outputs, wanted)

    def test_layers_as_experts(self):
        dense = keras.layers.Dense(4, activation="relu")
        layer = make(experts=dense, expert_units=(16,))
        same = make()
        for e, copy in enumerate(layer.experts.layers):
            for kind in ("kernel", "bias"):
                bank = getattr(same.experts.layers[0], kind)
                getattr(copy, kind).assign(bank[e])
        for kind in ("kernel", "bias"):
            value = getattr(same.task_gates, kind)
            getattr(layer.task_gates, kind).assign(value)
        x = inputs(5, 6)
        self.assert_relative(layer(x), ops.convert_to_numpy(same(x)))

    def test_layers_of_several_kinds(self):
        experts = [
            keras.Sequential([keras.layers.Dense(5), keras.layers.Dense(6)]),
            keras.layers.Identity(),
        ]
        layer = MultiGateMoE(
            1,
            num_task_experts=1,
            num_shared_experts=1,
            experts=experts,
            return_gates=True,
        )
        x = inputs(5, 2, 6)
        outputs, gates = layer(x)
        gates = ops.convert_to_numpy(gates)[:, 0]
        first = ops.convert_to_numpy(experts[0](x[:, 0]))
        wanted = gates[:, :1] * first + gates[:, 1:] * x[:, 1]
        self.assert_relative(outputs[:, 0], wanted)

    def test_expert_dropout(self):
        layer = make(expert_dropout=0.5, expert_units=[64], seed=3)
        x = inputs(5, 6)
        trained = ops.convert_to_numpy(layer(x, training=True))
        self.assertGreater(np.abs(trained - loop(layer, x)[0]).max(), 1e-2)
        self.assert_relative(layer(x), loop(layer, x)[0])
