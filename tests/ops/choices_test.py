import numpy as np
from keras import ops

from keras_moe.ops.choices import positive_choices
from tests.test_case import TestCase


class ChoicesTest(TestCase):
    def test_by_hand(self):
        nan = np.nan
        weights = np.array(
            [
                [0.0, 0.5, 0.0, 0.25],
                [0.0, 0.0, 0.0, 0.0],
                [1.0, 1.0, 1.0, 1.0],
                [0.0, nan, 2.0, 0.0],
            ],
            "float32",
        )
        weights = ops.convert_to_tensor(weights)
        indices, chosen = positive_choices(weights, weights, 4)
        self.assertAllEqual(
            indices, [[1, 3, 4, 4], [4, 4, 4, 4], [0, 1, 2, 3], [2, 4, 4, 1]]
        )
        self.assertAllEqual(
            chosen,
            [[0.5, 0.25, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [2, 0, 0, nan]],
        )
        indices, chosen = positive_choices(weights, weights, 1)
        self.assertAllEqual(indices, [[1], [4], [0], [2]])
        self.assertAllEqual(chosen, [[0.5], [0], [1], [2]])
