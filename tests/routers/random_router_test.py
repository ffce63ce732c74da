import keras
import numpy as np
from absl.testing import parameterized

from keras_moe.routers.random_router import RandomRouter
from tests.routers.linear_mixture import RouterChecks
from tests.routers.linear_mixture import compilers
from tests.routers.linear_mixture import to_numpy
from tests.test_case import TestCase


class RandomRouterTest(RouterChecks, TestCase):
    def make(self, **kwargs):
        return RandomRouter(4, **{"kind": "round_robin", **kwargs})

    def check_fields(self, routing, top_k):
        self.assertAllClose(
            routing.expert_weights, np.full((12, top_k), 1 / top_k)
        )
        self.assertAllEqual(routing.logits, np.zeros((12, 4)))
        self.assertAllClose(routing.probs, np.full((12, 4), 0.25))

    @parameterized.parameters(1, 3, 4)
    def test_round_robin(self, top_k):
        router = self.make(top_k=top_k)
        expected = [
            [(t * top_k + j) % 4 for j in range(top_k)] for t in range(12)
        ]
        for training in (False, True):
            routing = to_numpy(router(self.tokens(), training=training))
            self.assertAllEqual(routing.expert_indices, expected)
            self.check_fields(routing, top_k)
        self.assertFalse(hasattr(router, "seed_generator"))
        # In inference nothing is random.
        router = self.make(top_k=top_k, kind="uniform")
        routing = to_numpy(router(self.tokens()))
        self.assertAllEqual(routing.expert_indices, expected)

    def test_uniform(self):
        router, same = (RandomRouter(4, 3, seed=5) for _ in range(2))
        tokens = np.zeros((2000, 6), "float32")
        first, second = (
            to_numpy(router(tokens, training=True)).expert_indices
            for _ in range(2)
        )
        self.assertAllEqual(same(tokens, training=True).expert_indices, first)
        self.assertGreater(np.mean(first != second), 0.5)
        # Never the same twice, and each as often as another in each place.
        self.assertAllEqual([len(set(row)) for row in first], np.full(2000, 3))
        for column in first.T:
            loads = np.bincount(column, minlength=4) / 2000
            self.assertLess(np.abs(loads - 0.25).max(), 0.05)
        self.check_fields(to_numpy(router(tokens[:12], training=True)), top_k=3)

    def test_uniform_compiled(self):
        if keras.config.backend() != "tensorflow":
            self.skipTest("elsewhere `fit` has to carry the seed's state")
        router = RandomRouter(4, 3)
        for compiled in compilers().values():
            run = compiled(lambda x: router(x, training=True).expert_indices)
            indices = np.sort(np.array(run(keras.ops.ones((12, 6)))))
            self.assertTrue((np.diff(indices) > 0).all())
            self.assertBetween(indices.min(), 0, indices.max())
            self.assertLess(indices.max(), 4)

    def test_unknown_batch_size(self):
        router = self.make()
        inputs = keras.Input((6,))
        routing = router(inputs)
        self.assertEqual(routing.expert_indices.shape, (None, 2))
        model = keras.Model(inputs, routing.expert_indices)
        self.assertAllEqual(model(self.tokens()), [[0, 1], [2, 3]] * 6)

    def test_config(self):
        self.assertTrue(RandomRouter.looks_ahead)
        self.run_class_serialization_test(RandomRouter(4, 3, seed=2))
        self.run_class_serialization_test(self.make())

    @parameterized.parameters(
        ({"top_k": 5}, "top_k=5, num_experts=4"),
        ({"kind": "random"}, "kind='random'"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            RandomRouter(4, **kwargs)
