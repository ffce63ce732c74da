"""Values and gradients are compared with recorded cases in
tests/routing_cases (V-MoE, FastMoE); here is what those do not show."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.routers import NoisyTopKRouter
from tests.routing_cases.cases import recorded_draws
from tests.test_case import TestCase


def tokens(num_tokens=30):
    rng = np.random.default_rng(1)
    return rng.normal(size=(num_tokens, 6)).astype("float32")


class NoisyTopKRouterTest(TestCase):
    def test_starts_with_equal_loads(self):
        router = NoisyTopKRouter(4, 2, seed=3)
        routing = router(tokens(2000), training=True)
        self.assertAllEqual(routing.logits, np.zeros((2000, 4)))
        counts = np.bincount(
            ops.convert_to_numpy(routing.expert_indices).reshape(-1)
        )
        self.assertBetween(counts.min(), 900, 1000)
        # The width of the noise is softplus(0) + 0.01, whatever the token.
        self.assertAllClose(ops.mean(routing.load), 0.5, atol=0.02)

    def test_load_is_the_probability_of_being_drawn(self):
        # The noise of one expert is drawn anew, the others keep theirs.
        rng = np.random.default_rng(2)
        noise, kernel = rng.normal(size=(3, 4)), rng.normal(size=(6, 4))
        router = NoisyTopKRouter(4, 2, noise_stddev=0.7)
        router.build((None, 6))
        router.kernel.assign(kernel)
        with recorded_draws(normal=(noise,)):
            load = router(ops.array(tokens(3)), training=True).load
        load = ops.convert_to_numpy(load)
        logits = tokens(3) @ kernel
        noisy = logits + 0.7 * noise
        for t, e in np.ndindex(3, 4):
            threshold = np.sort(np.delete(noisy[t], e))[-2]
            draws = logits[t, e] + 0.7 * rng.normal(size=20000)
            self.assertAllClose(
                load[t, e], (draws > threshold).mean(), atol=0.015
            )

    def test_no_noise_in_inference(self):
        router = NoisyTopKRouter(5, 2, kernel_initializer="normal")
        first, second = router(tokens()), router(tokens())
        self.assertAllEqual(first.probs, second.probs)
        counts = np.bincount(
            ops.convert_to_numpy(first.expert_indices).reshape(-1), minlength=5
        )
        self.assertAllClose(ops.sum(first.load, axis=0), counts)

    def test_config_and_symbolic_call(self):
        for noise in ("learned", 0.5):
            router = NoisyTopKRouter(
                4, 2, noise_stddev=noise, load_threshold="shared", seed=1
            )
            self.run_class_serialization_test(router)
            inputs = keras.Input((6,))
            routing = router(inputs)
            self.assertEqual(routing.load.shape, (None, 4))

    @parameterized.parameters(
        ({"noise_stddev": 0.0}, "noise_stddev=0.0"),
        ({"noise_stddev": "fixed"}, "noise_stddev='fixed'"),
        ({"noise_epsilon": -1.0}, "noise_epsilon=-1.0"),
        ({"load_threshold": "k"}, "load_threshold='k'"),
        ({"gumbel_noise": 1.0}, "gumbel_noise=1.0"),
        ({"num_always_on": 1}, "num_always_on=1"),
        ({"top_k": 1, "score_after_selection": True}, "no gradient"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            NoisyTopKRouter(4, **kwargs)
