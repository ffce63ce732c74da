import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.ops.sinkhorn import sinkhorn
from tests.routers.linear_mixture import compilers
from tests.test_case import TestCase


def by_loop(logits, num_iterations, mask=None):
    """The iterations on the matrix itself, one row or column at a time."""
    matrix = np.exp(logits.astype("float64"))
    num_tokens, num_experts = matrix.shape
    real = range(num_tokens) if mask is None else np.flatnonzero(mask)
    matrix[[t for t in range(num_tokens) if t not in real]] = 0.0
    for _ in range(num_iterations if len(real) else 0):
        for t in real:
            matrix[t] /= matrix[t].sum() * len(real)
        for e in range(num_experts):
            matrix[:, e] /= matrix[:, e].sum() * num_experts
    return matrix


class SinkhornTest(TestCase):
    def logits(self, *shape):
        return np.random.default_rng(2).normal(size=shape).astype("float32") * 3

    @parameterized.parameters(1, 7)
    def test_against_loop(self, num_iterations):
        logits = self.logits(2, 9, 4)
        matrix = sinkhorn(logits, num_iterations)
        for g in range(2):
            expected = by_loop(logits[g], num_iterations)
            self.assert_relative(matrix[g], expected, 1e-6)
            alone = sinkhorn(logits[g], num_iterations)
            self.assert_relative(alone, expected, 1e-6)

    def test_shares(self):
        matrix = ops.convert_to_numpy(sinkhorn(self.logits(12, 4), 200))
        self.assertAllClose(matrix.sum(0), np.full(4, 1 / 4), atol=1e-6)
        self.assertAllClose(matrix.sum(1), np.full(12, 1 / 12), atol=1e-5)

    def test_mask(self):
        logits = self.logits(2, 9, 4)
        mask = np.array([[True] * 5 + [False] * 4, [False] * 9])
        logits[~mask] = np.nan
        matrix = ops.convert_to_numpy(sinkhorn(logits, 7, mask))
        self.assertAllEqual(matrix[~mask], np.zeros((13, 4)))
        expected = by_loop(logits[0, :5], 7)
        self.assert_relative(matrix[0, :5], expected, 1e-6)

    def test_mask_in_float64(self):
        if keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 unless told so as it starts.")
        logits = np.random.default_rng(2).normal(size=(9, 4))
        mask = np.arange(9) % 3 > 0
        matrix = sinkhorn(logits, 5, mask)
        self.assertDType(matrix, "float64")
        expected = by_loop(logits, 5, mask)
        self.assertAllClose(matrix, expected, rtol=0, atol=1e-14)

    def test_large_logits(self):
        # In float32 exp() of these is infinite; what counts is the difference.
        logits = np.array([[500.0, 300.0], [400.0, 100.0]], "float32")
        matrix = sinkhorn(logits, 30)
        expected = by_loop(logits, 30)
        # The second token insists more on the first expert.
        self.assertGreater(expected[0, 1], 0.4)
        self.assertGreater(expected[1, 0], 0.4)
        self.assert_relative(matrix, expected)

    def test_one_expert_one_token_no_token_half_precision(self):
        self.assertAllClose(sinkhorn(self.logits(3, 1)), np.full((3, 1), 1 / 3))
        self.assertAllClose(sinkhorn(self.logits(1, 4)), np.full((1, 4), 0.25))
        self.assertEqual(sinkhorn(np.zeros((0, 4), "float32")).shape, (0, 4))
        half = sinkhorn(ops.cast(self.logits(3, 2), "float16"), 2)
        self.assertEqual(ops.convert_to_numpy(half).dtype, "float32")

    def test_compiled(self):
        logits = self.logits(9, 4)
        for compiled in compilers().values():
            matrix = compiled(lambda x: sinkhorn(x, 3))(ops.array(logits))
            self.assert_relative(matrix, by_loop(logits, 3), 1e-6)

    @parameterized.parameters(0, 2.0, None)
    def test_errors(self, num_iterations):
        with self.assertRaisesRegex(ValueError, f"={num_iterations}$"):
            sinkhorn(self.logits(3, 2), num_iterations)
