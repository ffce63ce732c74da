"""What only TensorFlow can do to the fused experts."""

import keras
import numpy as np
import pytest
from absl.testing import parameterized

from keras_moe import backend
from tests.backend import fused_experts_test as fused
from tests.test_case import TestCase

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="about TensorFlow"
)
NAMES = ("expert_loop", "row_blocks")
TOP_K = 2


class FusedTensorFlowTest(TestCase):
    def setUp(self):
        super().setUp()
        import tensorflow as tf

        arrays = fused.operands(*fused.GROUPS["rows_of_no_group"])
        self.wanted = fused.expected(**arrays)
        self.d_out = tf.constant(arrays["d_out"], tf.float32)
        self.choices = tf.constant(arrays["choices"])
        self.sizes = tf.constant(arrays["sizes"])
        self.inputs = (
            tf.constant(arrays["tokens"], tf.float32),
            tf.constant(arrays["row_weights"], tf.float32),
            *(tf.constant(k, tf.float32) for k in arrays["kernels"]),
        )

    def call(self, name, tokens, row_weights, *kernels):
        return backend.FUSED_EXPERTS[name](
            tokens,
            row_weights,
            self.choices,
            self.sizes,
            kernels,
            (None,) * len(kernels),
            fused.LAYERS["glu"][1],
        )

    def check_gradients(self, gradients):
        _, d_tokens, d_row_weights, d_kernels, _ = self.wanted
        wanted = (d_tokens, d_row_weights, *d_kernels)
        for actual, exact in zip(gradients, wanted, strict=True):
            self.assert_relative(actual, exact, 1e-5)

    @parameterized.product(name=NAMES, graph=(False, True))
    def test_second_gradients_are_refused(self, name, graph):
        import tensorflow as tf

        def second(tokens, *others):
            with tf.GradientTape() as outer:
                outer.watch(tokens)
                with tf.GradientTape() as inner:
                    inner.watch(tokens)
                    out = self.call(name, tokens, *others)
                first = inner.gradient(out, tokens)
            return outer.gradient(first, tokens)

        with self.assertRaisesRegex(NotImplementedError, "twice"):
            (tf.function(second) if graph else second)(*self.inputs)

    @parameterized.parameters(*NAMES)
    def test_tape_around_a_function(self, name):
        """The function is split where its gradient starts."""
        import tensorflow as tf

        function = tf.function(
            lambda *inputs: self.call(name, *inputs),
            jit_compile=name == "row_blocks",
        )
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(self.inputs)
            out = function(*self.inputs)
        for _ in range(2):
            self.check_gradients(
                tape.gradient(out, self.inputs, output_gradients=self.d_out)
            )

    @parameterized.product(name=NAMES, graph=(False, True))
    def test_variables_and_a_gradient_of_a_few_tokens(self, name, graph):
        """A gather has a gradient of slices."""
        import tensorflow as tf

        variables = [tf.Variable(x) for x in self.inputs]

        def step():
            with tf.GradientTape() as tape:
                out = tf.gather(self.call(name, *variables), tf.range(20))
                loss = tf.reduce_sum(out * self.d_out)
            return tape.gradient(loss, variables)

        self.check_gradients((tf.function(step) if graph else step)())

    def test_tokens_of_any_number_in_a_loop(self):
        """As `fit` has it with several steps per execution."""
        import tensorflow as tf

        tokens, *others = self.inputs
        spec = tf.TensorSpec((None, tokens.shape[1]))

        @tf.function(input_signature=[spec])
        def steps(tokens):
            total = tf.zeros_like(tokens)
            for _ in tf.range(3):
                with tf.GradientTape() as tape:
                    tape.watch(tokens)
                    out = self.call("expert_loop", tokens, *others)
                total += tape.gradient(out, tokens, self.d_out)
            return total

        self.assert_relative(steps(tokens), 3 * self.wanted[1], 1e-5)

    @parameterized.parameters(*NAMES)
    def test_weights_of_experts_without_rows_stay_unread(self, name):
        import tensorflow as tf

        tokens, row_weights, *kernels = self.inputs
        experts = 64
        kernels = [
            tf.concat([k, tf.fill((experts - 4, *k.shape[1:]), np.nan)], axis=0)
            for k in kernels
        ]

        @tf.function(jit_compile=name == "row_blocks")
        def decode(tokens, row_weights, *kernels):
            return backend.FUSED_EXPERTS[name](
                tokens,
                row_weights,
                tf.range(TOP_K),
                tf.one_hot(1, experts, dtype=tf.int32)
                + tf.one_hot(3, experts, dtype=tf.int32),
                kernels,
                (None,) * len(kernels),
                fused.LAYERS["glu"][1],
            )

        out = decode(tokens[:1], row_weights[:TOP_K], *kernels)
        self.assertTrue(np.isfinite(out).all())
