"""What XLA must never do to us: see backend/tensorflow/groups.py."""

import keras
import numpy as np
import pytest

from keras_moe import backend
from keras_moe.ops import grouped_matmul
from tests.backend import fused_experts_test as fused
from tests.backend.grouped_matmul_test import expected
from tests.backend.grouped_matmul_test import operands
from tests.test_case import TestCase

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="about TensorFlow's XLA"
)
SIZES = (17, 3, 12, 8)


class XLATest(TestCase):
    def setUp(self):
        super().setUp()
        self.lhs, self.rhs, self.grad = operands(40, SIZES)
        self.arguments = (
            self.lhs.astype("float32"),
            self.rhs.astype("float32"),
            np.array(SIZES, "int32"),
        )
        self.wanted = expected(self.lhs, self.rhs, SIZES, self.grad)[0]

    def test_default_is_right_under_xla(self):
        import tensorflow as tf

        for signature in (None, (tf.TensorSpec((None, 8)), *self.specs())):
            compiled = tf.function(
                grouped_matmul, jit_compile=True, input_signature=signature
            )
            self.assert_relative(compiled(*self.arguments), self.wanted)

    def specs(self):
        import tensorflow as tf

        return tf.TensorSpec((4, 8, 16)), tf.TensorSpec((4,), tf.int32)

    def test_a_forced_expert_loop_refuses_xla(self):
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def compiled(*args):
            return grouped_matmul(*args, implementation="expert_loop")

        with self.assertRaisesRegex(NotImplementedError, "XLA"):
            compiled(*self.arguments)

    def test_a_graph_traced_before_xla_is_right_or_refused(self):
        import tensorflow as tf

        inner = tf.function(grouped_matmul)
        inner(*self.arguments)  # traced with the expert loop
        concrete = inner.get_concrete_function(
            *map(tf.constant, self.arguments)
        )

        def outer(function):
            return tf.function(lambda *a: function(*a), jit_compile=True)

        # A tf.function is traced anew for XLA, or refused; a concrete function
        # cannot be, and must be refused.
        with self.assertRaisesRegex(
            (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError),
            "AsString",
        ):
            outer(concrete)(*map(tf.constant, self.arguments))
        try:
            out = outer(inner)(*self.arguments)
        except tf.errors.InvalidArgumentError as error:
            self.assertIn("AsString", str(error))
        else:
            self.assert_relative(out, self.wanted)

    def test_data_is_no_compile_time_constant(self):
        # XLA would compile again for every batch.
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def step(lhs, rhs, sizes):
            with tf.GradientTape() as tape:
                tape.watch((lhs, rhs))
                out = grouped_matmul(lhs, rhs, sizes)
            return tape.gradient(out, (lhs, rhs))

        arguments = list(map(tf.constant, self.arguments))
        hlo = step.experimental_get_compiler_ir(*arguments)(stage="hlo")
        for parameter in ("f32[40,8]", "f32[4,8,16]", "s32[4]"):
            self.assertRegex(
                hlo,
                rf"{parameter.replace('[', '.').replace(']', '.')}.*parameter",
            )


class FusedXLATest(TestCase):
    def setUp(self):
        super().setUp()
        import tensorflow as tf

        arrays = fused.operands(*fused.GROUPS["uneven"])
        self.wanted = fused.expected(**arrays)[0]
        self.arguments = (
            tf.constant(arrays["tokens"], tf.float32),
            tf.constant(arrays["row_weights"], tf.float32),
            tf.constant(arrays["choices"]),
            tf.constant(arrays["sizes"]),
            *(tf.constant(k, tf.float32) for k in arrays["kernels"]),
        )

    def call(self, name):
        def call(tokens, row_weights, choices, sizes, *kernels):
            return backend.FUSED_EXPERTS[name](
                tokens,
                row_weights,
                choices,
                sizes,
                kernels,
                (None,) * len(kernels),
                fused.LAYERS["glu"][1],
            )

        return call

    def test_the_loop_refuses_xla(self):
        import tensorflow as tf

        compiled = tf.function(self.call("expert_loop"), jit_compile=True)
        with self.assertRaisesRegex(NotImplementedError, "XLA"):
            compiled(*self.arguments)

    def test_a_loop_traced_before_xla_is_refused(self):
        import tensorflow as tf

        inner = tf.function(self.call("expert_loop"))
        self.assert_relative(inner(*self.arguments), self.wanted)
        concrete = inner.get_concrete_function(*self.arguments)

        @tf.function(jit_compile=True)
        def outer(*arguments):
            return concrete(*arguments)

        @tf.function(jit_compile=True)
        def gradient(tokens, *arguments):
            with tf.GradientTape() as tape:
                tape.watch(tokens)
                out = concrete(tokens, *arguments)
            return tape.gradient(out, tokens)

        for function in (outer, gradient):
            with self.assertRaisesRegex(
                (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError),
                "AsString",
            ):
                function(*self.arguments)

    def test_blocks_with_any_number_of_tokens(self):
        import tensorflow as tf

        specs = [
            tf.TensorSpec((None, *x.shape[1:]), x.dtype)
            for x in self.arguments[:3]
        ]
        specs += [tf.TensorSpec(x.shape, x.dtype) for x in self.arguments[3:]]
        compiled = tf.function(
            self.call("row_blocks"), jit_compile=True, input_signature=specs
        )
        self.assert_relative(compiled(*self.arguments), self.wanted)
        tokens, row_weights, choices, sizes, *kernels = self.arguments
        none = (tokens[:0], row_weights[:0], choices[:0], 0 * sizes)
        self.assertEqual(compiled(*none, *kernels).shape, (0, fused.O))

    def test_data_is_no_compile_time_constant(self):
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def step(*arguments):
            with tf.GradientTape() as tape:
                tape.watch(arguments)
                out = self.call("row_blocks")(*arguments)
            return tape.gradient(out, (*arguments[:2], *arguments[4:]))

        hlo = step.experimental_get_compiler_ir(*self.arguments)(stage="hlo")
        for parameter in (r"f32\[20,8\]", r"s32\[40\]", r"s32\[4\]"):
            self.assertRegex(hlo, rf"{parameter}.*parameter")
