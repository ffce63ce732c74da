"""The k-th largest over the rows of several devices, found digit by digit."""

import numpy as np
from keras import ops

from keras_moe.ops.order_statistics import kth_largest
from tests.replicas import together
from tests.test_case import TestCase


class KthLargestTest(TestCase):
    def test_against_sorting(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(40, 3)) * 10.0 ** rng.integers(-30, 30, 3)
        values[:8, 0] = values[3, 0]  # ties
        values[::7, 1] = -np.inf
        values[::5, 2] = 0.0
        values = values.astype("float32")
        parts = values[:0], values[:7], values[7:]
        wanted = -np.sort(-values, axis=0)
        for k in (1, 2, 17, 39, 40):
            found = together(
                *(lambda x=x, k=k: kth_largest(ops.array(x), k) for x in parts)
            )
            for result in found:
                self.assertAllEqual(result, wanted[k - 1])
