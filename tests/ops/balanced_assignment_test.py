import numpy as np
from absl.testing import parameterized
from keras import ops
from scipy.optimize import linear_sum_assignment

from keras_moe.ops.balanced_assignment import balanced_assignment
from tests.routers.linear_mixture import compilers
from tests.test_case import TestCase


def best_total(scores):
    """The exact optimum: each expert has `ceil(T / E)` columns of its own.

    The last of them, which `T % E` experts fill, are taken by tokens or, for
    the other experts, by rows that may stand nowhere else.
    """
    num_tokens, num_experts = scores.shape
    floor, rest = divmod(num_tokens, num_experts)
    columns = np.repeat(scores.astype("float64"), floor, axis=1)
    if rest:
        columns = np.concatenate([columns, scores], axis=1)
        fill = np.full((num_experts - rest, columns.shape[1]), -1e6)
        fill[:, floor * num_experts :] = 0.0
        columns = np.concatenate([columns, fill])
    row, column = linear_sum_assignment(-columns)
    real = row < num_tokens
    return columns[row[real], column[real]].sum()


class BalancedAssignmentTest(TestCase):
    def check(self, scores, experts, tolerance=1e-5):
        experts = ops.convert_to_numpy(experts)
        self.assertEqual(experts.dtype, "int32")
        num_tokens, num_experts = scores.shape
        loads = np.bincount(experts, minlength=num_experts)
        self.assertLen(loads, num_experts)
        self.assertEqual(loads.min(), num_tokens // num_experts)
        self.assertEqual(loads.max(), -(-num_tokens // num_experts))
        total = scores[np.arange(num_tokens), experts].sum(dtype="float64")
        best = best_total(scores)
        slack = (
            tolerance * num_tokens * max(scores.astype("float64").std(), 1e-20)
        )
        self.assertBetween(total, best - slack, best + slack)

    @parameterized.named_parameters(
        ("even", 24, 4, 0.0),
        ("uneven", 23, 4, 0.0),
        ("fewer_tokens_than_experts", 3, 4, 0.0),
        ("preferred_expert", 24, 4, 20.0),
        ("one_expert", 5, 1, 0.0),
        ("one_token", 1, 3, 0.0),
    )
    def test_against_scipy(self, num_tokens, num_experts, preference):
        rng = np.random.default_rng(num_tokens)
        scores = rng.normal(size=(num_tokens, num_experts))
        scores[:, 0] += preference
        scores = scores.astype("float32")
        self.check(scores, balanced_assignment(scores))

    def test_scales(self):
        scores = np.random.default_rng(0).normal(size=(24, 4))
        for scale in (1e-25, 1e25):
            scaled = (scale * scores).astype("float32")
            self.check(scaled, balanced_assignment(scaled))

    def test_alike(self):
        rng = np.random.default_rng(0)
        experts = balanced_assignment(np.zeros((24, 4), "float32"))
        # Spread by position, where nothing else tells them apart.
        self.assertAllEqual(experts, np.arange(24) % 4)
        few = np.repeat(rng.normal(size=(3, 4)), 8, axis=0).astype("float32")
        self.check(few, balanced_assignment(few))
        alike = np.repeat(rng.normal(size=(1, 4)), 24, axis=0)
        alike = alike.astype("float32")
        self.check(alike, balanced_assignment(alike))

    def test_groups_and_mask(self):
        scores = np.random.default_rng(1).normal(size=(3, 24, 4))
        scores = scores.astype("float32")
        mask = np.ones((3, 24), bool)
        mask[1, ::3] = False
        mask[2] = False
        scores[~mask] = np.nan
        experts = ops.convert_to_numpy(balanced_assignment(scores, mask))
        self.assertAllEqual(experts[~mask], np.full(32, 4))
        self.check(scores[0], experts[0])
        self.check(scores[1, mask[1]], experts[1, mask[1]])
        alone = balanced_assignment(scores[0], mask[0])
        self.assertAllEqual(alone, experts[0])

    def test_scores_that_are_not_finite_are_the_worst(self):
        scores = np.random.default_rng(3).normal(size=(24, 4))
        scores = scores.astype("float32")
        scores[:18, 0], scores[20, 1], scores[21, 2] = np.nan, -np.inf, np.inf
        finite = np.where(np.isfinite(scores), scores, np.nan)
        filled = np.where(np.isnan(finite), np.nanmin(finite), finite)
        self.check(filled, balanced_assignment(scores))

    def test_compiled(self):
        scores = np.random.default_rng(4).normal(size=(23, 4))
        scores = scores.astype("float32")
        scores[:, 1] += 3.0
        for compiled in compilers().values():
            self.check(scores, compiled(balanced_assignment)(ops.array(scores)))

    def test_no_token(self):
        empty = balanced_assignment(np.zeros((0, 4), "float32"))
        self.assertEqual(tuple(empty.shape), (0,))
        empty = balanced_assignment(np.zeros((2, 0, 4), "float32"))
        self.assertEqual(tuple(empty.shape), (2, 0))
