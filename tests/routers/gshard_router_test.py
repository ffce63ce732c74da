"""Values and gradients are compared with recorded cases in
tests/routing_cases (lingvo, st-moe-pytorch); here is what those do not show."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.routers import GShardRouter
from tests.test_case import TestCase


def make(**kwargs):
    router = GShardRouter(4, seed=3, **kwargs)
    router.build((None, 4))
    router.kernel.assign(np.eye(4))
    return router


def as_numpy(routing):
    return [
        ops.convert_to_numpy(field)
        for field in (routing.expert_indices, routing.expert_weights)
    ]


class GShardRouterTest(TestCase):
    def logits(self, *probs, num_tokens=4000):
        return np.tile(np.log(probs), (num_tokens, 1)).astype("float32")

    @parameterized.parameters((0.5, 0.4), (0.2, 1.0), (0.8, 0.25))
    def test_how_often_a_second_expert_stays(self, threshold, share):
        # Its normalized weight is 0.2 of 0.8 + 0.2.
        router = make(threshold=threshold)
        tokens = self.logits(0.64, 0.16, 0.1, 0.1)
        indices, weights = as_numpy(router(tokens, training=True))
        stays = indices[:, 1] == 1
        self.assertAllClose(stays.mean(), share, atol=0.03)
        # The others have none, and the first keeps what it has.
        self.assertAllEqual(indices[~stays, 1], [4] * (~stays).sum())
        self.assertAllEqual(weights[~stays, 1], np.zeros((~stays).sum()))
        self.assertAllClose(weights[:, 0], np.full(4000, 0.8), atol=1e-6)

    def test_a_threshold_for_each_choice(self):
        router = make(top_k=3, threshold=[0.1, 10.0])
        tokens = self.logits(0.4, 0.3, 0.2, 0.1)
        indices, _ = as_numpy(router(tokens, training=True))
        self.assertAllEqual(indices[:, 1], [1] * 4000)
        self.assertAllClose((indices[:, 2] == 2).mean(), 0.2 / 9, atol=0.01)

    def test_sampling(self):
        router = make(policy="sampling")
        tokens = self.logits(0.4, 0.3, 0.2, 0.1)
        indices, _ = as_numpy(router(tokens, training=True))
        self.assertAllEqual(indices[:, 0], [0] * 4000)
        shares = np.bincount(indices[:, 1], minlength=4) / 4000
        self.assertAllClose(shares, [0, 0.5, 1 / 3, 1 / 6], atol=0.03)

    def test_draws_in_training_alone(self):
        tokens = self.logits(0.64, 0.16, 0.1, 0.1, num_tokens=50)
        for policy in ("random", "sampling", "all"):
            router = make(policy=policy, threshold=10.0)
            indices, _ = as_numpy(router(tokens))
            self.assertAllEqual(indices[:, 1], [1] * 50)
            drawn, _ = as_numpy(router(tokens, training=True))
            self.assertEqual((drawn[:, 1] == 1).all(), policy == "all")
        always = make(threshold=10.0, random_in_inference=True)
        self.assertFalse((as_numpy(always(tokens))[0][:, 1] == 1).all())

    def test_config_and_symbolic_call(self):
        router = GShardRouter(5, 3, threshold=np.array([0.5, 0.2]), seed=1)
        self.run_class_serialization_test(router)
        routing = router(keras.Input((6,)))
        self.assertEqual(routing.expert_indices.shape, (None, 3))

    @parameterized.parameters(
        ({"policy": "none"}, "policy='none'"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": [0.1, 0.2]}, r"threshold=\[0.1, 0.2\]"),
        ({"top_k": 1}, "top_k=1"),
        ({"policy": "sampling", "expert_bias": True}, "expert_bias=True"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            GShardRouter(4, **kwargs)
