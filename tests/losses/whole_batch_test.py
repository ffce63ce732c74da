"""On several devices, each loss is the one of the whole batch on each."""

import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import routers
from tests.losses.cases import CASES
from tests.losses.cases import GROUPED
from tests.losses.cases import arrays
from tests.losses.cases import tensor_routing_of
from tests.losses.cases import with_per
from tests.losses.gradients import value_and_gradient
from tests.losses.two_devices import values_and_gradients
from tests.test_case import TestCase

# Two devices have two sequences of three tokens each.
UNEVEN = np.array([1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1], bool)
NONE_ON_THE_FIRST = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1], bool)


class WholeBatchTest(TestCase):
    def check(self, loss, mask, sequences=4):
        logits, indices = arrays(seed=2)

        def of(tokens, sequences):
            own = None if mask is None else ops.array(mask[tokens])
            return lambda logits: loss(
                tensor_routing_of(logits, indices[tokens]), own, sequences
            )

        value, gradient = value_and_gradient(of(slice(12), sequences), logits)
        halves = slice(6), slice(6, 12)
        parts = values_and_gradients(
            [of(half, sequences // 2) for half in halves],
            [logits[half] for half in halves],
        )
        self.assertGreater(np.abs(gradient).max(), 1e-4)
        for half, (own_value, own_gradient) in zip(halves, parts, strict=True):
            self.assertAllClose(own_value, value, rtol=1e-5)
            # Training takes the mean over the devices.
            self.assertAllClose(own_gradient / 2, gradient[half], atol=1e-6)

    @parameterized.parameters(*CASES)
    def test_of_the_batch(self, name):
        self.check(CASES[name][0], UNEVEN)

    def test_without_a_mask(self):
        for name in ("balance_hf", "information", "z"):
            self.check(CASES[name][0], None)

    def test_a_device_without_a_token(self):
        for name in ("balance", "importance", "marginal"):
            self.check(CASES[name][0], NONE_ON_THE_FIRST)

    def test_per_sequence(self):
        for name in GROUPED[:: len(GROUPED) // 3]:
            self.check(with_per(CASES[name][0], "sequence"), UNEVEN)
        self.check(with_per(CASES["balance"][0], 2), NONE_ON_THE_FIRST)


class RouterLossTest(TestCase):
    def test_losses_that_routers_add(self):
        x = np.random.default_rng(3).normal(size=(12, 5)).astype("float32")
        for router in (
            routers.ReLURouter(4, top_k=2, initial_l1_coefficient=0.1),
            routers.DSelectKRouter(3, top_k=2, entropy_weight=0.1),
        ):
            router.trainable = False  # the coefficient stays
            router.build((None, 5))

            def of(tokens, router=router):
                mask = ops.array(UNEVEN[tokens])

                def loss(x):
                    results = router.stateless_call(
                        [v.value for v in router.trainable_variables],
                        [v.value for v in router.non_trainable_variables],
                        x,
                        mask=mask,
                        training=True,
                        return_losses=True,
                    )
                    return sum(results[-1])

                return loss

            value, gradient = value_and_gradient(of(slice(12)), x)
            halves = slice(6), slice(6, 12)
            parts = values_and_gradients(
                [of(half) for half in halves], [x[half] for half in halves]
            )
            self.assertGreater(np.abs(gradient).max(), 1e-4)
            for half, (own, own_gradient) in zip(halves, parts, strict=True):
                self.assertAllClose(own, value, rtol=1e-5)
                self.assertAllClose(own_gradient / 2, gradient[half], atol=1e-6)
