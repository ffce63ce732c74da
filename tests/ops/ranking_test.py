import numpy as np
from keras import ops

from keras_moe.ops.ranking import descending_ranks
from tests.routers.linear_mixture import compilers
from tests.test_case import TestCase


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
