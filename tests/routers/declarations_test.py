"""What routers declare about what they return is true.

`distinct_choices`: no token goes twice to one expert; `choices_per_token`: the
width of the routing; `routing_class`: its class.
"""

import inspect

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import routers
from tests.test_case import TestCase

TOKENS, DIM, EXPERTS = 40, 5, 6

CASES = {
    "base": lambda: routers.BASERouter(EXPERTS),
    "cosine": lambda: routers.CosineRouter(EXPERTS, 3, projection_dim=4),
    "dense": lambda: routers.DenseRouter(EXPERTS),
    "dselect_k": lambda: routers.DSelectKRouter(EXPERTS, 3),
    "entmax": lambda: routers.EntmaxRouter(EXPERTS),
    "expert_choice": lambda: routers.ExpertChoiceRouter(EXPERTS),
    "gshard": lambda: routers.GShardRouter(EXPERTS, 3),
    "gshard_sampling": lambda: routers.GShardRouter(
        EXPERTS, 3, policy="sampling"
    ),
    "hierarchical": lambda: routers.HierarchicalRouter(3, 2, 2, 2),
    "mlp": lambda: routers.MLPRouter(EXPERTS, 3, hidden_dims=(4,)),
    "noisy_top_k": lambda: routers.NoisyTopKRouter(EXPERTS, 3),
    "random": lambda: routers.RandomRouter(EXPERTS, 4),
    "round_robin": lambda: routers.RandomRouter(EXPERTS, 4, kind="round_robin"),
    "relu": lambda: routers.ReLURouter(EXPERTS, 3),
    "sinkhorn": lambda: routers.SinkhornRouter(EXPERTS, 3),
    "sparse_mixer": lambda: routers.SparseMixerRouter(
        EXPERTS, 4, jitter_epsilon=0.3
    ),
    "task": lambda: routers.TaskRouter(EXPERTS, 2, 3),
    "top_k": lambda: routers.TopKRouter(
        EXPERTS, 3, num_always_on=2, expert_dropout=0.8, expert_bias=True
    ),
    "top_k_groups": lambda: routers.TopKRouter(
        EXPERTS, 3, num_expert_groups=3, top_k_groups=2, noise_stddev=1.0
    ),
    "top_p": lambda: routers.TopPRouter(EXPERTS, 0.9),
}


def tokens(extreme):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(TOKENS, DIM)).astype("float32")
    x[:4] = 0.0  # all experts tie
    if extreme:
        x[4:8] *= 1e38
        x[8:12] = np.nan
        x[12:16, 0], x[16:20, 1] = np.inf, -np.inf
    return x


class DeclarationsTest(TestCase):
    @parameterized.named_parameters((name, name) for name in CASES)
    def test_routings_are_as_declared(self, name):
        router = CASES[name]()
        self.assertTrue(router.distinct_choices)
        router.build((None, DIM))
        rng = np.random.default_rng(2)
        for variable in router.trainable_variables:
            variable.assign(rng.normal(size=variable.shape))
        kwargs = {}
        if router.uses_context:
            kwargs["context"] = ops.array(np.arange(TOKENS) % 2, "int32")
        some = ops.array(np.arange(TOKENS) % 3 > 0)
        # Each two of the three options in all their combinations.
        for extreme, mask, training in (
            (False, None, True),
            (True, some, True),
            (False, some, False),
            (True, None, False),
        ):
            x = ops.array(tokens(extreme))
            routing = router(x, mask=mask, training=training, **kwargs)
            self.assertIs(type(routing), router.routing_class)
            self.check(routing.expert_indices, router)

    def check(self, indices, router):
        indices = ops.convert_to_numpy(indices)
        self.assertEqual(indices.shape[1], router.choices_per_token)
        self.assertEqual(indices.shape[1], router.max_choices(None))
        self.assertTrue(((indices >= 0) & (indices <= EXPERTS)).all())
        for row in indices:
            existing = row[row < EXPERTS]
            self.assertLen(set(existing), len(existing), row)

    def test_each_that_says_so_is_here(self):
        says_so = {
            value
            for value in vars(routers).values()
            if inspect.isclass(value)
            and getattr(value, "distinct_choices", False)
        }
        self.assertEqual(says_so, {type(make()) for make in CASES.values()})

    def test_of_the_other_routers(self):
        # A table may name an expert twice.
        router = routers.HashRouter(2, table=[[1, 1, 0]])
        self.assertFalse(router.distinct_choices)
        self.assertEqual(router.choices_per_token, 3)
        self.assertIs(router.routing_class, routers.Routing)
        soft = routers.SoftRouter(2)
        self.assertIs(type(soft(ops.ones((1, 2, 3)))), soft.routing_class)
        self.assertIsNone(soft.choices_per_token)
        base = routers.Router(2)
        self.assertIsNone(base.routing_class)
        self.assertIsNone(base.choices_per_token)
        per = {routers.BASERouter(2, per=p).per for p in ("sequence", 3)}
        self.assertEqual(per, {"sequence", 3})
        self.assertEqual(routers.TopKRouter(2).per, "batch")
        needing = {
            value
            for value in vars(routers).values()
            if getattr(value, "needs_context", False)
        }
        self.assertEqual(needing, {routers.HashRouter, routers.TaskRouter})
