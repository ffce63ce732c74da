import numpy as np
from keras import ops

from keras_moe.ops import assignment_chains as chains
from tests.test_case import TestCase


class ChainsTest(TestCase):
    def test_best_moves(self):
        gains = np.array(
            [
                [[0.0, -1.0, -2.0], [0.0, -3.0, 1.0], [5.0, 0.0, 5.0]],
                [[-9.0, 0.0, -1.0], [-2.0, 0.0, -7.0], [9.0, 9.0, 9.0]],
            ],
            "float32",
        )
        experts = np.array([[0, 0, 1], [1, 1, 3]], "int32")
        moves = ops.convert_to_numpy(
            chains.best_moves(ops.array(gains), ops.array(experts))
        )
        self.assertAllEqual(moves[0, :2], [[0.0, -1.0, 1.0], [5.0, 0.0, 5.0]])
        self.assertAllEqual(moves[1, 1], [-2.0, 0.0, -1.0])
        # No token to move.
        empty = np.full((3, 3), chains.LOWEST, "float32")
        self.assertAllEqual(moves[[0, 1, 1], [2, 0, 2]], empty)

    def test_the_best_chain_is_not_the_direct_one(self):
        # From 0 to 3: directly -9, by way of 1 and 2: -1 - 2 + 1 = -2.
        moves = np.full((1, 4, 4), -9.0, "float32")
        moves[0, 0, 1], moves[0, 1, 2], moves[0, 2, 3] = -1.0, -2.0, 1.0
        sinks = np.array([[False, False, False, True]])
        following, gain = chains.best_chains(ops.array(moves), ops.array(sinks))
        self.assertAllEqual(following, [[1, 2, 3, 3]])
        self.assertAllClose(gain, [[-2.0, -1.0, 1.0, 0.0]])
        following, on_chain = chains.follow(
            following, ops.array([0], "int32"), ops.array(moves), sinks
        )
        self.assertAllEqual(on_chain, [[True, True, True, False]])

    def test_a_circle_becomes_a_direct_move(self):
        following = ops.array([[1, 0, 2, 3], [2, 1, 2, 3]], "int32")
        moves = np.zeros((2, 4, 4), "float32")
        moves[0, 0] = [0.0, 9.0, -5.0, -3.0]
        sinks = np.array([[False, False, True, True]] * 2)
        following, on_chain = chains.follow(
            following,
            ops.array([0, 0], "int32"),
            ops.array(moves),
            ops.array(sinks),
        )
        self.assertAllEqual(following, [[3, 0, 2, 3], [2, 1, 2, 3]])
        self.assertAllEqual(on_chain, [[True, False, False, False]] * 2)

    def test_one_move(self):
        scores = np.array([[[3.0, 1.0], [3.0, 2.0], [0.0, 9.0]]], "float32")
        experts = ops.array([[0, 0, 1]], "int32")
        arguments = (
            ops.array(scores),
            experts,
            ops.array([[True, False]]),
            ops.array([[False, True]]),
        )
        # Token 1 loses 1, token 0 would lose 2.
        moved = chains.move_along_best_chain(*arguments, ops.array([[-2.0]]))
        self.assertAllEqual(moved[0], [[0, 1, 1]])
        self.assertAllEqual(moved[1], [[True]])
        moved = chains.move_along_best_chain(*arguments, ops.array([[0.0]]))
        self.assertAllEqual(moved[0], [[0, 0, 1]])
        self.assertAllEqual(moved[1], [[False]])
