import numpy as np
from keras import ops

from keras_moe.ops.scores import rankable
from keras_moe.ops.scores import softmax
from keras_moe.ops.selection import top_k_indices
from tests.test_case import TestCase


class ScoresTest(TestCase):
    def test_softmax(self):
        x = np.random.default_rng(0).normal(size=(3, 1, 4)).astype("float32")
        shares = np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)
        self.assertAllClose(softmax(ops.array(x)), shares, atol=1e-6)
        # Without a warning, which here would be an error.
        self.assertAllEqual(softmax(ops.array(x), axis=1), np.ones(x.shape))

    def test_rankable(self):
        scores = ops.array([[np.nan, -np.inf, -2.0, np.inf]])
        scores = rankable(scores)
        self.assertAllClose(scores, [[-1e30, -1e30, -2.0, np.inf]])
        excluded = ops.array([[True, False, False, False]])
        scores = ops.where(excluded, float("-inf"), scores)
        self.assertAllEqual(top_k_indices(scores, 4), [[3, 2, 1, 0]])
