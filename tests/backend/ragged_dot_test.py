"""What only JAX has: its own grouped product, and asking what it costs."""

import keras
import numpy as np
import pytest

from tests.backend.grouped_matmul_test import expected
from tests.backend.grouped_matmul_test import operands
from tests.test_case import TestCase

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "jax", reason="about JAX"
)


class RaggedDotTest(TestCase):
    def test_dense_products_are_seen(self):
        import jax

        from keras_moe.backend.jax import grouped_matmul

        # As many flops as one product with each group, on CPU.
        self.assertEqual(jax.default_backend(), "cpu")
        self.assertFalse(grouped_matmul.ragged_dot_is_sparse("cpu"))

    def test_best_first(self):
        import jax

        from keras_moe.backend.jax import grouped_matmul

        lhs = jax.numpy.ones((4, 2))
        self.assertEqual(grouped_matmul.best_first(lhs), ("row_blocks",))
        names = []
        jax.jit(lambda x: names.extend(grouped_matmul.best_first(x)))(lhs)
        self.assertEqual(names, ["row_blocks"])

    def test_garbage_in_rows_of_no_group(self):
        import jax

        from keras_moe.backend.jax import GROUPED_MATMUL

        sizes = (4, 0, 7)
        lhs, rhs, grad = operands(16, sizes)
        wanted = expected(lhs, rhs, sizes, grad)
        lhs[11:], grad[11:] = np.inf, np.nan
        lhs, rhs, grad = (a.astype("float32") for a in (lhs, rhs, grad))

        @jax.jit
        def both(lhs, rhs, grad, sizes):
            def product(lhs, rhs):
                return GROUPED_MATMUL["ragged_dot"](lhs, rhs, sizes)

            out, pull = jax.vjp(product, lhs, rhs)
            return out, *pull(grad)

        actual = both(lhs, rhs, grad, np.array(sizes, "int32"))
        for a, w in zip(actual, wanted, strict=True):
            self.assert_relative(np.asarray(a), w, 1e-5)
