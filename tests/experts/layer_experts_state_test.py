"""Losses and state of LayerExperts: padding must count in neither."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import layers
from keras import ops

from keras_moe import experts
from keras_moe.experts import LayerExperts
from tests.test_case import TestCase

SIZES = (3, 0, 2)
STATIC = keras.config.backend() == "jax"  # eagerly, too


class AddsLoss(layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(x))
        return x


class Counts(layers.Layer):
    """Counts the rows that its mask lets through."""

    def build(self, shape):
        self.rows = self.add_weight(shape=(), trainable=False)
        self.rows.assign(0.1)  # not a bfloat16

    def call(self, x, mask=None, training=None):
        number = ops.shape(x)[0]
        if mask is not None:
            number = ops.sum(ops.cast(mask, "float32"))
        if training:
            self.rows.assign(self.rows + number)
        return x


def step(layer, rows, sizes, compiler=None, **kwargs):
    """`(losses, non-trainable variables)` after one call in training."""
    rows, sizes = ops.array(rows), ops.array(sizes, "int32")
    if compiler == "jit":
        import jax

        call = jax.jit(
            lambda t, o, rows, sizes: layer.stateless_call(
                t, o, rows, sizes, training=True, return_losses=True, **kwargs
            )[1:]
        )
        state, losses = call(
            [v.value for v in layer.trainable_variables],
            [v.value for v in layer.non_trainable_variables],
            rows,
            sizes,
        )
    elif compiler in ("graph", "xla"):
        import tensorflow as tf

        @tf.function(jit_compile=compiler == "xla")
        def call(rows, sizes):
            layer(rows, sizes, training=True, **kwargs)
            return layer.losses

        losses = call(rows, sizes)
        state = layer.non_trainable_variables
    else:
        layer(rows, sizes, training=True, **kwargs)
        losses, state = layer.losses, layer.non_trainable_variables
    return (
        [float(ops.convert_to_numpy(loss)) for loss in losses],
        {
            v.path.split("/", 1)[1]: ops.convert_to_numpy(value)
            for v, value in zip(
                layer.non_trainable_variables, state, strict=True
            )
        },
    )


COMPILERS = {
    "jax": (None, "jit"),
    "tensorflow": (None, "graph", "xla"),
    "torch": (None,),
}[keras.config.backend()]


class LayerExpertsStateTest(TestCase):
    def setUp(self):
        super().setUp()
        rng = np.random.default_rng(9)
        self.rows = rng.normal(size=(6, 4)).astype("float32")
        self.groups = [self.rows[:3], self.rows[3:3], self.rows[3:5]]

    @parameterized.product(compiler=COMPILERS, max_group_size=(None, 4))
    def test_activity_regularizers(self, compiler, max_group_size):
        template = keras.Sequential(
            [
                layers.Dense(
                    3, bias_initializer="ones", activity_regularizer="l2"
                ),
                layers.ActivityRegularization(l1=0.5),
            ]
        )
        layer = LayerExperts(template, 3)
        layer.build((None, 4))
        wanted = []
        for copy, rows in zip(layer.layers, self.groups, strict=True):
            if len(rows):
                kernel, bias = map(ops.convert_to_numpy, copy.weights)
                out = rows @ kernel + bias
                wanted.append(0.01 * np.sum(out**2) / len(rows))
                wanted.append(0.5 * np.sum(np.abs(out)) / len(rows))
        losses, _ = step(
            layer, self.rows, SIZES, compiler, max_group_size=max_group_size
        )
        losses = sorted(losses)
        while len(losses) > len(wanted):  # of the expert without rows
            self.assertEqual(losses.pop(0), 0)
        self.assertAllClose(losses, sorted(wanted), rtol=1e-5)
        for copy in layer.layers:  # as they were
            regularizer = copy.layers[0].activity_regularizer
            self.assertIsInstance(regularizer, keras.regularizers.L2)

    @parameterized.product(compiler=COMPILERS, nested=(False, True))
    def test_batch_normalization(self, compiler, nested):
        template = layers.BatchNormalization(momentum=0.5)
        if nested:
            template = keras.Sequential([layers.Activation("linear"), template])
        layer = LayerExperts(template, 3)
        layer.build((None, 4))
        _, state = step(layer, self.rows, SIZES, compiler)
        for e, rows in enumerate(self.groups):
            moving = [v for k, v in state.items() if f"expert_{e}/" in k]
            mean, variance = np.zeros(4), np.ones(4)
            if len(rows):
                mean = 0.5 * rows.mean(axis=0)
                variance = 0.5 + 0.5 * rows.var(axis=0)
            self.assertAllClose(moving[0], mean, rtol=1e-4, atol=1e-6)
            self.assertAllClose(moving[1], variance, rtol=1e-4, atol=1e-6)

    def test_outputs_of_batch_normalization(self):
        layer = LayerExperts(layers.BatchNormalization(), 3)
        layer.build((None, 4))
        out, d_rows, _ = self.outputs_and_gradients(
            layer,
            self.rows,
            group_sizes=ops.array(SIZES, "int32"),
            training=True,
        )
        wanted = np.zeros((6, 4))
        for rows, part in (
            (self.groups[0], slice(3)),
            (self.groups[2], slice(3, 5)),
        ):
            deviation = np.sqrt(rows.var(axis=0) + 1e-3)
            wanted[part] = (rows - rows.mean(axis=0)) / deviation
        self.assertAllClose(out, wanted, atol=1e-4)
        self.assertTrue(np.isfinite(d_rows).all())

    @parameterized.product(compiler=COMPILERS)
    def test_state_of_a_masked_layer(self, compiler):
        layer = LayerExperts(Counts(), 3, dtype="mixed_bfloat16")
        layer.build((None, 4))
        _, state = step(layer, self.rows, SIZES, compiler)
        counted = [float(v) for v in state.values()]
        # Its own sum is in bfloat16; what it did not touch stays as it was.
        self.assertAllClose(counted, [3.1, 0.1, 2.1], atol=0.02)
        layer = LayerExperts([Counts()], dtype="mixed_bfloat16")
        layer.build((None, 4))
        layer.layers[0].rows.assign(0.1)
        layer(self.rows, ops.array([4], "int32"))
        self.assertAllClose(layer.layers[0].rows, 0.1, atol=1e-7)

    @parameterized.named_parameters(
        (
            "conv",
            lambda: keras.Sequential(
                [layers.Conv1D(4, 1), layers.BatchNormalization()]
            ),
        ),
        (
            "lstm",
            lambda: keras.Sequential(
                [layers.LSTM(4), layers.BatchNormalization()]
            ),
        ),
        ("functional", lambda: functional()),
    )
    def test_state_that_no_mask_reaches(self, make):
        layer = LayerExperts(make(), 2)
        rows, sizes = np.ones((4, 3, 4), "float32"), (2, 2)
        layer(rows, ops.array(sizes, "int32"))  # in inference it is fine
        static = {"jax": (None, "jit"), "tensorflow": ("xla",), "torch": ()}
        for compiler in static[keras.config.backend()]:
            with self.assertRaisesRegex(ValueError, "takes a `mask`.*expert_0"):
                step(layer, rows, sizes, compiler)
        if not STATIC:
            step(layer, rows, sizes)
        for copy in layer.layers:
            copy.trainable = False  # nothing changes then
        step(layer, rows, sizes, COMPILERS[-1])

    def test_eager_gradients_of_an_expert_without_rows(self):
        if keras.config.backend() != "tensorflow":
            return  # torch and JAX: see `outputs_and_gradients`
        import tensorflow as tf

        layer = LayerExperts(layers.Dense(3), 3)
        with tf.GradientTape() as tape:
            out = layer(self.rows, ops.array(SIZES, "int32"))
        gradients = tape.gradient(
            out, [v.value for v in layer.trainable_variables]
        )
        self.assertAllEqual(gradients[2], np.zeros((4, 3)))
        self.assertAllEqual(gradients[1], [3.0, 3.0, 3.0])

    def test_added_losses(self):
        layer = LayerExperts(AddsLoss(), 2)
        rows, sizes = np.ones((4, 3), "float32"), (2, 2)
        if STATIC:
            with self.assertRaisesRegex(ValueError, "`add_loss`.*expert_0"):
                step(layer, rows, sizes)
        else:
            losses, _ = step(layer, rows, sizes)
            self.assertAllClose(losses, [1.0, 1.0])
        if keras.config.backend() == "tensorflow":
            with self.assertRaisesRegex(ValueError, "`add_loss`.*expert_0"):
                step(layer, rows, sizes, "xla")

    def test_a_bank_in_the_middle_of_another(self):
        # Weight regularizers of copies count once, padded or not.
        layer = LayerExperts(layers.Dense(3, kernel_regularizer="l2"), 2)
        mixed = experts.MixedExperts([layer, LayerExperts(layers.Dense(3), 1)])
        mixed.build((None, 4))
        losses, _ = step(mixed, self.rows, (2, 2, 1), COMPILERS[-1])
        wanted = [
            0.01 * np.sum(ops.convert_to_numpy(copy.kernel) ** 2)
            for copy in layer.layers
        ]
        self.assertAllClose(sorted(losses), sorted(wanted), rtol=1e-5)


def functional():
    x = keras.Input((3, 4))
    return keras.Model(x, layers.BatchNormalization()(x))
