"""`STARDense` and `PartitionedNormalization`."""

import os

import keras
import numpy as np
from keras import ops

from keras_moe.layers import PartitionedNormalization
from keras_moe.layers import STARDense
from tests.recommendation.gates.multi_gate_moe_test import inputs
from tests.test_case import TestCase

DOMAIN = np.array([2, 0, 2, 1, 0], "int32")


def filled(layer, *shapes):
    layer.build(*shapes)
    rng = np.random.default_rng(0)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer


class STARDenseTest(TestCase):
    def test_loop(self):
        layer = filled(STARDense(3, 4, "relu"), (None, 6), (None,))
        x = inputs(5, 6)
        w = {v.name: ops.convert_to_numpy(v) for v in layer.weights}
        wanted = np.stack(
            [
                x @ (w["kernel"] * w["domain_kernel"][d])
                + w["bias"]
                + w["domain_bias"][d]
                for d in range(3)
            ],
            axis=1,
        )
        wanted = np.maximum(wanted, 0)
        self.assert_relative(layer(x), wanted)
        own = wanted[np.arange(5), DOMAIN]
        self.assert_relative(layer(x, DOMAIN), own)
        stranger = np.array([2, 0, 3, -1, 0], "int32")
        outputs = ops.convert_to_numpy(layer(x, stranger))
        self.assertAllClose(outputs[2:4], np.zeros((2, 4)))
        self.assert_relative(outputs[[0, 1, 4]], own[[0, 1, 4]])

    def test_inputs_of_each_domain(self):
        layer = filled(STARDense(3, 4, use_bias=False), (None, 3, 6))
        x = inputs(5, 3, 6)
        kernel = ops.convert_to_numpy(layer.kernel * layer.domain_kernel)
        self.assert_relative(layer(x), np.einsum("bnd,nde->bne", x, kernel))
        self.assertLen(layer.weights, 2)

    def test_domains_start_alike(self):
        layer = STARDense(3, 4)
        y = ops.convert_to_numpy(layer(inputs(5, 6)))
        self.assertAllClose(y[:, 0], y[:, 1])
        self.assertGreater(np.abs(y).max(), 0)

    def test_a_domain_trains_its_own_kernel(self):
        layer = filled(STARDense(3, 4), (None, 6), (None,))
        domain = ops.convert_to_tensor(np.array([1] * 5, "int32"))
        _, _, d = self.outputs_and_gradients(layer, inputs(5, 6), domain=domain)
        used = np.abs(d["domain_kernel"]).max(axis=(1, 2)) > 0
        self.assertEqual(used.tolist(), [False, True, False])

    def test_layer_contract(self):
        self.run_layer_test(
            STARDense,
            init_kwargs={"num_domains": 3, "units": 4},
            input_shape=(2, 5),
            expected_output_shape=(2, 3, 4),
            expected_num_trainable_weights=4,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=False,
        )

    def test_errors(self):
        for name in ("num_domains", "units"):
            with self.assertRaisesRegex(ValueError, f"`{name}` must"):
                STARDense(**{"num_domains": 3, "units": 4, name: 0})
        for shape in ((4,), (4, None), (4, 2, 5)):
            with self.assertRaisesRegex(ValueError, "inputs_shape="):
                STARDense(3, 4).build(shape)
        with self.assertRaisesRegex(ValueError, r"domain_shape=\(4, 1\)"):
            STARDense(3, 4).build((4, 5), (4, 1))


class PartitionedNormalizationTest(TestCase):
    def test_statistics_of_each_domain(self):
        layer = filled(
            PartitionedNormalization(4, momentum=0.5), (None, 6), (None,)
        )
        x = inputs(40, 6)
        domain = np.random.default_rng(1).integers(0, 3, 40).astype("int32")
        y = ops.convert_to_numpy(layer(x, domain, training=True))
        w = {v.name: ops.convert_to_numpy(v) for v in layer.weights}
        for d in range(3):
            rows = x[domain == d]
            z = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-3)
            wanted = z * w["gamma"] * w["domain_gamma"][d]
            wanted = wanted + w["beta"] + w["domain_beta"][d]
            self.assert_relative(y[domain == d], wanted, 1e-4)
            self.assertAllClose(
                w["moving_mean"][d], 0.5 * rows.mean(0), atol=1e-5
            )
            unbiased = rows.var(0, ddof=1)
            self.assertAllClose(
                w["moving_variance"][d], 0.5 + 0.5 * unbiased, atol=1e-5
            )
            z = rows - w["moving_mean"][d]
            z = z / np.sqrt(w["moving_variance"][d] + 1e-3)
            wanted = z * w["gamma"] * w["domain_gamma"][d]
            wanted = wanted + w["beta"] + w["domain_beta"][d]
            rest = ops.convert_to_numpy(layer(x, domain))[domain == d]
            self.assert_relative(rest, wanted, 1e-4)
        # No example: nothing moved.
        self.assertAllClose(w["moving_mean"][3], np.zeros(6))
        self.assertAllClose(w["moving_variance"][3], np.ones(6))

    def test_rare_domain(self):
        layer = PartitionedNormalization(3, momentum=0.9)
        rng = np.random.default_rng(0)
        domain = np.array([0] * 12 + [1] + [2] * 2, "int32")
        for _ in range(60):
            x = rng.normal(size=(15, 64)).astype("float32") * 2
            y = layer(x, domain, training=True)
        # One example has no variance, and the averages stay as they began.
        self.assertAllClose(layer.moving_mean[1], np.zeros(64))
        self.assertAllClose(layer.moving_variance[1], np.ones(64))
        self.assertAllClose(y[12], x[12] / np.sqrt(1.001), atol=1e-5)
        # Two have one that is right on average.
        variance = ops.convert_to_numpy(layer.moving_variance[2])
        self.assertAllClose(variance.mean(), 4.0, atol=0.5)

    def test_averages_are_not_rounded(self):
        layer = PartitionedNormalization(1, dtype="mixed_bfloat16")
        x = inputs(8, 2) + 3
        for _ in range(300):
            y = layer(x, np.zeros(8, "int32"), training=True)
        self.assertDType(y, "bfloat16")
        mean = ops.convert_to_numpy(layer.moving_mean)[0]
        rounded = ops.convert_to_numpy(
            ops.cast(ops.cast(x, "bfloat16"), "float32")
        )
        wanted = (1 - 0.99**300) * rounded.mean(0)
        self.assertAllClose(mean, wanted, rtol=1e-4)

    def test_domains_are_apart(self):
        layer = PartitionedNormalization(2)
        x, domain = inputs(6, 2), np.array([0, 1, 0, 1, 0, 1], "int32")
        clean = ops.convert_to_numpy(layer(x, domain, training=True))
        x[1] = np.inf
        y = ops.convert_to_numpy(layer(x, domain, training=True))
        self.assertAllClose(y[::2], clean[::2])

    def test_saving_and_fit(self):
        x = keras.Input((6,))
        domain = keras.Input((), dtype="int32")
        h = PartitionedNormalization(3)(x, domain)
        y = keras.layers.Dense(1)(STARDense(3, 4, "relu")(h, domain))
        model = keras.Model([x, domain], y)
        model.compile("adam", "mse")
        batch = [inputs(5, 6), DOMAIN]
        model.fit(batch, inputs(5, 1), epochs=2, verbose=0)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assert_relative(loaded(batch), ops.convert_to_numpy(model(batch)))

    def test_errors(self):
        for name, value in (
            ("num_domains", 0),
            ("momentum", 1.0),
            ("epsilon", 0.0),
        ):
            with self.assertRaisesRegex(ValueError, f"`{name}` must"):
                PartitionedNormalization(**{"num_domains": 3, name: value})
        for shapes in (((4, None), (4,)), ((4, 5), (4, 1))):
            with self.assertRaisesRegex(ValueError, "domain_shape="):
                PartitionedNormalization(3).build(*shapes)
