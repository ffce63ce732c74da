import keras
import numpy as np
from keras import ops

from keras_moe.ops import top_k_indices
from keras_moe.ops.selection import descending_ranks
from tests.routers.linear_mixture import compilers
from tests.test_case import TestCase


class TopKIndicesTest(TestCase):
    def indices(self, scores, k):
        return ops.convert_to_numpy(top_k_indices(ops.array(scores), k))

    def test_ties_go_to_the_lower_index(self):
        # Enough columns for the unstable algorithms to show themselves.
        scores = np.zeros((3, 300), "float32")
        scores[1, 200:] = 1.0
        scores[2, ::2] = -1.0
        indices = self.indices(scores, 5)
        self.assertAllEqual(
            indices,
            [[0, 1, 2, 3, 4], [200, 201, 202, 203, 204], [1, 3, 5, 7, 9]],
        )
        self.assertEqual(indices.dtype, "int32")

    def test_zeros_tie_whatever_their_sign(self):
        scores = np.array([[-0.0, 0.0, -0.0, 0.0]], "float32")
        for run in (top_k_indices, *self.compiled()):
            self.assertAllEqual(run(ops.array(scores), 3), [[0, 1, 2]])

    def compiled(self):
        if keras.config.backend() == "jax":
            import jax

            return [jax.jit(top_k_indices, static_argnums=1)]
        if keras.config.backend() == "tensorflow":
            import tensorflow as tf

            return [
                tf.function(top_k_indices, jit_compile=True),
                tf.function(top_k_indices),
            ]
        return []

    def test_nan_is_the_smallest(self):
        nan = float("nan")
        scores = [[nan, 1.0, nan, 2.0], [nan, nan, nan, nan]]
        self.assertAllEqual(self.indices(scores, 2), [[3, 1], [0, 1]])

    def test_no_token(self):
        self.assertEqual(self.indices(np.ones((0, 4)), 2).shape, (0, 2))


class DescendingRanksTest(TestCase):
    def test_ties_signs_and_nan(self):
        scores = np.array(
            [
                [[1.0, 3.0, 3.0, 2.0, 1.0], [0.0, -0.0, 0.0, -0.0, 1.0]],
                [[np.nan, -np.inf, 1.0, -5.0, 2.0], [4.0, 3.0, 2.0, 1.0, 0.0]],
            ],
            "float32",
        )
        expected = [
            [[3, 0, 1, 2, 4], [1, 2, 3, 4, 0]],
            [[3, 4, 1, 2, 0], [0, 1, 2, 3, 4]],
        ]
        self.assertAllEqual(descending_ranks(ops.array(scores)), expected)
        for compiled in compilers().values():
            ranks = compiled(descending_ranks)(ops.array(scores))
            self.assertAllEqual(ranks, expected)

    def test_many_ties(self):
        ranks = descending_ranks(ops.zeros((2, 300)))
        self.assertAllEqual(ranks, [np.arange(300)] * 2)
        self.assertEqual(ops.convert_to_numpy(ranks).dtype, "int32")
        self.assertEqual(descending_ranks(ops.zeros((3, 0))).shape, (3, 0))
