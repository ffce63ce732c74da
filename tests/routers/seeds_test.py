"""Kernels of one router that come from one seed are drawn apart."""

import itertools

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import routers
from tests.test_case import TestCase

DIM = 6


def normal():
    return keras.initializers.RandomNormal(stddev=1.0, seed=3)


CASES = {
    "cosine": lambda: routers.CosineRouter(
        4,
        projection_dim=DIM,
        projection_initializer=normal(),
        kernel_initializer=normal(),
    ),
    "dselect_k": lambda: routers.DSelectKRouter(4, 2, gamma=100.0, seed=3),
    "dselect_k_of_all_tokens": lambda: routers.DSelectKRouter(
        4, 2, gamma=100.0, per_token=False, seed=3
    ),
    "hierarchical": lambda: routers.HierarchicalRouter(
        2, 2, kernel_initializer=normal()
    ),
    "mlp": lambda: routers.MLPRouter(
        4,
        projection_dim=DIM,
        hidden_dims=(DIM, DIM),
        hidden_initializer=normal(),
        kernel_initializer=normal(),
    ),
}


class SeedsTest(TestCase):
    @parameterized.named_parameters((name, name) for name in CASES)
    def test_drawn_apart_and_again(self, name):
        router, again = CASES[name](), CASES[name]()
        drawn = []
        for variables in zip(
            self.built(router), self.built(again), strict=True
        ):
            first, second = (
                ops.convert_to_numpy(v).reshape(-1).astype("float64")
                for v in variables
            )
            self.assertAllEqual(first, second)
            if np.ptp(first) > 0:  # not a bias of zeros
                drawn.append(first)
        self.assertGreater(len(drawn), 1)
        for one, other in itertools.combinations(drawn, 2):
            # Their ranges may differ: ratios are equal if the draws are.
            size = min(len(one), len(other), 2)
            ratio = one[:size] / other[:size]
            self.assertGreater(np.ptp(ratio) / np.abs(ratio).max(), 1e-3)

    def built(self, router):
        router.build((None, DIM))
        return router.trainable_variables

    def test_the_first_kernel_is_what_the_initializer_draws(self):
        for name, kernel, units in (
            ("cosine", "kernel", 4),
            ("mlp", "kernel", 4),
            ("hierarchical", "group_kernel", 2),
        ):
            router = CASES[name]()
            router.build((None, DIM))
            wanted = ops.convert_to_numpy(normal()((DIM, units)))
            self.assertAllEqual(getattr(router, kernel), wanted)
