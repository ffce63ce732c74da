"""`StackedDense` and `StackedMLP` against lists of Keras' own layers."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import StackedDense
from keras_moe.layers import StackedMLP
from tests.recommendation.gates.multi_gate_moe_test import inputs
from tests.test_case import TestCase


def of_keras(layer, number):
    """Network `number` of a built `StackedDense`, in Keras' own layers."""
    parts = [keras.layers.Dense(layer.units, use_bias=layer.use_bias)]
    parts[0].build((None, layer.kernel.shape[1]))
    parts[0].kernel.assign(layer.kernel[number])
    if layer.use_bias:
        parts[0].bias.assign(layer.bias[number])
    if layer.normalization == "batch":
        norm = keras.layers.BatchNormalization()
    elif layer.normalization == "layer":
        norm = keras.layers.LayerNormalization()
        norm.build((None, layer.units))
        norm.gamma.assign(layer.gamma[number])
        norm.beta.assign(layer.beta[number])
    activation = keras.layers.Activation(layer.activation)
    if layer.normalization is None:
        return keras.Sequential([*parts, activation])
    rest = [norm, activation]
    if layer.normalization_place == "after_activation":
        rest = rest[::-1]
    return keras.Sequential([*parts, *rest])


class StackedDenseTest(TestCase):
    @parameterized.parameters(
        (None, "before_activation", 1),
        ("layer", "before_activation", 2),
        ("batch", "before_activation", 4),
        ("batch", "after_activation", None),
    )
    def test_list_of_layers(self, normalization, place, slots):
        layer = StackedDense(
            4,
            3,
            "tanh",
            normalization=normalization,
            normalization_place=place,
            bias_initializer="random_normal",
        )
        x = inputs(30, 5) if slots is None else inputs(30, slots, 5)
        outputs = ops.convert_to_numpy(layer(x, training=True))
        self.assertEqual(outputs.shape, (30, 4, 3))
        for number in range(4):
            own = x if slots is None else x[:, number * slots // 4]
            wanted = of_keras(layer, number)(own, training=True)
            wanted = ops.convert_to_numpy(wanted)
            self.assert_relative(outputs[:, number], wanted, 1e-4)

    def test_moving_averages_of_each_network(self):
        layer = StackedDense(2, 3, normalization="batch")
        x = inputs(50, 2, 4) * np.array([1.0, 5.0], "float32")[:, None]
        for _ in range(300):
            layer(x, training=True)
        h = np.einsum("bnd,nde->bne", x, ops.convert_to_numpy(layer.kernel))
        wanted = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-3)
        self.assert_relative(layer(x), wanted, 0.06)

    def test_mlp(self):
        mlp = StackedMLP(
            3, [5, 4], output_units=2, normalization="layer", seed=1
        )
        x = inputs(6, 7)
        outputs = ops.convert_to_numpy(mlp(x))
        for number in range(3):
            h = x
            for dense in mlp.layers:
                h = of_keras(dense, number)(h)
            wanted = ops.convert_to_numpy(h)
            self.assert_relative(outputs[:, number], wanted)
        self.assertEqual(mlp.layers[-1].normalization, None)
        self.assertEqual(mlp.compute_output_shape((6, 7)), (6, 3, 2))

    def test_seeded_initializers(self):
        initializer = keras.initializers.RandomNormal(seed=3)
        first, second = (
            StackedMLP(2, [4, 4], kernel_initializer=initializer)
            for _ in range(2)
        )
        first.build((None, 4))
        second.build((None, 4))
        kernels = [
            kernel
            for dense in first.layers
            for kernel in ops.convert_to_numpy(dense.kernel)
        ]
        for i, kernel in enumerate(kernels):
            for other in kernels[:i]:
                self.assertGreater(np.abs(kernel - other).max(), 1e-3)
        for ours, theirs in zip(first.layers, second.layers, strict=True):
            self.assertAllClose(ours.kernel, theirs.kernel)

    def test_dropout(self):
        mlp = StackedMLP(2, [50], dropout=0.5, seed=1, activation=None)
        x = inputs(20, 6)
        plain = ops.convert_to_numpy(mlp(x))
        dropped = ops.convert_to_numpy(mlp(x, training=True))
        off = dropped == 0
        self.assertBetween(off.mean(), 0.45, 0.55)
        self.assert_relative(dropped[~off], 2 * plain[~off])

    @parameterized.parameters(
        (StackedDense, {"units": 3, "normalization": "batch"}),
        (StackedMLP, {"units": [3, 2], "output_units": 4, "dropout": 0.1}),
    )
    def test_layer_contract(self, make, kwargs):
        batch = "normalization" in kwargs
        self.run_layer_test(
            make,
            init_kwargs={"num_networks": 3, **kwargs},
            input_shape=(2, 5),
            expected_output_shape=(2, 3, 3 if batch else 4),
            expected_num_trainable_weights=4 if batch else 6,
            expected_num_non_trainable_weights=2 if batch else 0,
            expected_num_seed_generators=0 if batch else 2,
            expected_num_losses=0,
            supports_masking=False,
        )

    @parameterized.parameters(
        ({"num_networks": 0}, "`num_networks` must"),
        ({"units": 0}, "`units` must"),
        ({"normalization": "group"}, "`normalization` must"),
        ({"normalization_place": "last"}, "`normalization_place` must"),
        ({"normalization_epsilon": 0}, "`normalization_epsilon` must"),
        ({"dropout": 1}, "`dropout` must"),
    )
    def test_errors(self, kwargs, message):
        for make in (StackedDense, StackedMLP):
            with self.assertRaisesRegex(ValueError, message):
                make(**{"num_networks": 4, "units": 3, **kwargs})

    def test_errors_of_shapes(self):
        for shape in ((4,), (4, None), (4, 3, 5), (4, None, 5)):
            for make in (StackedDense, StackedMLP):
                with self.assertRaisesRegex(ValueError, "input_shape="):
                    make(4, 3).build(shape)

    def test_errors_of_no_layers(self):
        with self.assertRaisesRegex(ValueError, r"`units` must .*units=\[\]"):
            StackedMLP(2, [])
        with self.assertRaisesRegex(ValueError, "`output_units` must"):
            StackedMLP(2, [3], output_units=0)
