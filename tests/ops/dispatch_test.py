import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.ops import Routing
from keras_moe.ops import combine
from keras_moe.ops import dispatch
from tests import token_loop
from tests.test_case import TestCase


def routing_of(indices, weights=None, probs=None):
    indices = np.asarray(indices, "int32")
    if weights is None:
        weights = np.ones(indices.shape)
    return Routing(
        logits=None,
        probs=None if probs is None else ops.array(probs.astype("float32")),
        expert_indices=ops.array(indices),
        expert_weights=ops.array(np.asarray(weights, "float32")),
    )


class DispatchTest(TestCase):
    def test_by_hand(self):
        # Token 0 goes to experts 2 and 0, token 1 to 0 and 2, token 2 to 2, 1.
        tokens = ops.array([[10.0], [11.0], [12.0]])
        routing = routing_of([[2, 0], [0, 2], [2, 1]])
        rows, sizes, plan = dispatch(tokens, routing, num_experts=3)
        # Expert 0: first choice of 1, second choice of 0. Expert 1: second of
        # 2. Expert 2: first choices of 0 and 2, second of 1.
        self.assertAllEqual(rows[:, 0], [11, 10, 12, 10, 12, 11])
        self.assertAllEqual(sizes, [2, 1, 3])
        self.assertAllEqual(plan.choices, [1, 3, 5, 0, 2, 4])
        self.assertAllEqual(plan.positions, [[3, 1], [0, 5], [4, 2]])
        self.assertIsNone(plan.kept)
        # Combining the rows themselves with weights 1 doubles each token.
        out = combine(rows, plan, routing.expert_weights)
        self.assertAllClose(out[:, 0], [20, 22, 24])

    def test_capacity_by_hand(self):
        # Expert 0 is wanted by token 0 (second choice), 1 and 2 (first).
        tokens = ops.array([[10.0], [11.0], [12.0]])
        weights = [[0.5, 0.9], [0.6, 0.1], [0.7, 0.2]]
        routing = routing_of([[1, 0], [0, 1], [0, 2]], weights)
        for policy, capacity, kept in (
            ("position", 2, [[1, 0], [1, 1], [1, 1]]),
            ("position", 1, [[1, 0], [1, 0], [0, 1]]),
            ("weight", 2, [[1, 1], [0, 1], [1, 1]]),
            ("weight", 1, [[1, 1], [0, 0], [0, 1]]),
        ):
            _, sizes, plan = dispatch(
                tokens,
                routing,
                num_experts=3,
                capacity=capacity,
                drop_policy=policy,
            )
            self.assertAllEqual(ops.cast(plan.kept, "int32"), kept)
            self.assertEqual(int(ops.sum(sizes)), int(np.sum(kept)))

    @parameterized.product(
        policy=("position", "weight", "token", "priority"),
        capacity=(1, 5),
        masked=(False, True),
        groups=(1, 3),
    )
    def test_against_asking_one_after_the_other(
        self, policy, capacity, masked, groups
    ):
        self.check(policy, capacity, masked, top_k=3, groups=groups)

    @parameterized.product(
        capacity=(None, 0, 5, 40), masked=(False, True), top_k=(1, 3)
    )
    def test_by_position(self, capacity, masked, top_k):
        self.check("position", capacity, masked, top_k, groups=1)

    def check(self, policy, capacity, masked, top_k, groups):
        rng = np.random.default_rng(0)
        num_tokens, num_experts = 30, 5
        # Few different weights, so that there are ties.
        weights = rng.integers(1, 4, (num_tokens, top_k)) / 4
        indices = rng.permuted(
            np.tile(np.arange(num_experts), (num_tokens, 1)), axis=1
        )[:, :top_k]
        mask = rng.random(num_tokens) < 0.7 if masked else None
        tokens = rng.normal(size=(num_tokens, 4)).astype("float32")
        # Few different priorities too.
        probs = rng.integers(1, 4, (num_tokens, num_experts)) / 4
        routing = routing_of(indices, weights, probs)
        rows, sizes, plan = dispatch(
            ops.array(tokens),
            routing,
            num_experts,
            None if mask is None else ops.array(mask),
            capacity,
            policy,
            None if groups == 1 else num_tokens // groups,
        )
        kept = token_loop.keep(
            indices,
            weights,
            num_experts,
            np.ones(num_tokens, bool) if mask is None else mask,
            capacity,
            policy,
            groups,
            probs.max(axis=1),
        )
        if plan.kept is None:
            self.assertTrue(kept.all())
        else:
            self.assertAllEqual(plan.kept, kept)
        self.assertAllEqual(
            sizes, np.bincount(indices[kept], minlength=num_experts)
        )
        # Every kept choice has its token's row among the rows of its expert.
        rows, ends = ops.convert_to_numpy(rows), np.cumsum(sizes)
        positions = ops.convert_to_numpy(plan.positions)
        for t, k in np.argwhere(kept):
            np.testing.assert_array_equal(rows[positions[t, k]], tokens[t])
            e = indices[t, k]
            self.assertBetween(positions[t, k], ends[e] - sizes[e], ends[e] - 1)
        self.assertEqual(len(np.unique(positions)), positions.size)
        # Rows of tokens that were not kept are not read, whatever they hold.
        rows[int(ends[-1]) :] = np.nan
        out = combine(ops.array(rows), plan, routing.expert_weights)
        self.assertAllClose(
            out, tokens * np.sum(weights * kept, axis=1, keepdims=True)
        )

    def test_choices_that_do_not_exist(self):
        # Token 0 has one expert, token 1 has two, token 2 none.
        routing = routing_of([[0, 2], [1, 0], [2, 2]], [[1, 0], [1, 1], [0, 0]])
        tokens = ops.array([[10.0], [11.0], [12.0]])
        for capacity, expected in ((None, [10, 22, 0]), (1, [10, 11, 0])):
            rows, sizes, plan = dispatch(
                tokens, routing, num_experts=2, capacity=capacity
            )
            self.assertAllEqual(sizes, [1 if capacity else 2, 1])
            out = combine(rows, plan, routing.expert_weights)
            self.assertAllClose(out[:, 0], expected)

    def test_unknown_policy(self):
        with self.assertRaisesRegex(ValueError, "drop_policy='fair'"):
            dispatch(ops.ones((1, 1)), routing_of([[0]]), 1, drop_policy="fair")
