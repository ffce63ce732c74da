import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.routers.expert_choice_router import ExpertChoiceRouter
from tests import token_loop
from tests.routers.linear_mixture import LinearMixture
from tests.routers.linear_mixture import RouterChecks
from tests.routers.linear_mixture import Sequences
from tests.routers.linear_mixture import numpy_mixture
from tests.routers.linear_mixture import router_gradient
from tests.routers.linear_mixture import to_numpy
from tests.test_case import TestCase


def choose(probs, groups, places, mask=None):
    """`(T, E)` bool, one group and one expert after the other."""
    mask = np.ones(len(probs), bool) if mask is None else mask
    size = len(probs) // groups
    chosen = np.zeros(probs.shape, bool)
    for g in range(groups):
        real = [t for t in range(g * size, (g + 1) * size) if mask[t]]
        for e in range(probs.shape[1]):
            best = sorted(real, key=lambda t: -probs[t, e])[:places]
            chosen[best, e] = True
    return chosen


def probabilities(tokens, kernel):
    return np.array([token_loop.softmax(t @ kernel) for t in tokens])


class ExpertChoiceRouterTest(RouterChecks, TestCase):
    def make(self, **kwargs):
        kwargs = {"kernel_initializer": "normal", "seed": 1, **kwargs}
        return ExpertChoiceRouter(4, **kwargs)

    @parameterized.named_parameters(
        ("default", {}, 1, 6),
        ("ceil", {"capacity_factor": 1.1}, 1, 4),
        ("groups", {"per": "sequence", "capacity_factor": 1.0}, 3, 1),
        ("two_sequences", {"per": 2, "capacity_factor": 1.0}, 1, 3),
        ("capacity", {"capacity": 5}, 1, 5),
        ("all", {"capacity_factor": 9.0}, 1, 12),
        ("multiple", {"capacity_factor": 1.0, "capacity_multiple_of": 4}, 1, 4),
        ("multiple_beyond", {"capacity_multiple_of": 16}, 1, 12),
    )
    def test_against_loop(self, options, groups, places):
        router = self.make(kernel_initializer="glorot_normal", **options)
        num_sequences = 2 if options.get("per") == 2 else groups
        mask = np.array([True] * 7 + [False] + [True] * 4)
        routing = to_numpy(
            router(self.tokens(), mask=mask, num_sequences=num_sequences)
        )
        kernel = ops.convert_to_numpy(router.kernel).astype(float)
        tokens = np.where(mask[:, None], self.tokens(), 0.0).astype(float)
        probs = probabilities(tokens, kernel)
        chosen = choose(probs, groups, places, mask)
        self.assert_relative(routing.logits, tokens @ kernel)
        self.assert_relative(routing.probs, probs)
        self.assertAllEqual(
            routing.expert_indices, np.where(chosen, np.arange(4), 4)
        )
        self.assert_relative(
            routing.expert_weights, np.where(chosen, probs, 0.0)
        )
        # Everything that is real may be taken here, and is.
        loads = chosen.reshape(groups, -1, 4).sum(1)
        self.assertLessEqual(loads.max(), places)
        self.assertEqual(
            router.max_rows(12, num_sequences), groups * 4 * places
        )

    def test_ties_go_to_the_earlier_token(self):
        router = self.make(kernel_initializer="zeros", capacity=5)
        routing = to_numpy(router(self.tokens()))
        chosen = routing.expert_indices != 4
        self.assertAllEqual(chosen, [[True] * 4] * 5 + [[False] * 4] * 7)

    def test_fewer_real_tokens_than_places(self):
        mask = np.array([False] * 9 + [True] * 3)
        routing = to_numpy(self.make()(self.tokens(), mask=mask))
        expected = np.where(mask[:, None], np.arange(4), 4)
        self.assertAllEqual(routing.expert_indices, expected)

    def test_gradients_against_loop(self):
        rng = np.random.default_rng(2)
        router = self.make(kernel_initializer="glorot_normal", per="sequence")
        weights = rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 3))
        layer = LinearMixture(router, *weights)
        mask = np.array([True] * 7 + [False] + [True] * 4)
        cotangent = rng.normal(size=(12, 3))
        layer(self.tokens(), mask=mask, num_sequences=2)
        y, dx, dw = self.outputs_and_gradients(
            layer, self.tokens(), cotangent, mask=mask, num_sequences=2
        )
        arrays = {
            "x": self.tokens(),
            "router": ops.convert_to_numpy(router.kernel),
            "kernel": weights[0],
            "bias": weights[1],
        }
        chosen = choose(
            probabilities(arrays["x"], arrays["router"].astype(float)),
            2,
            3,
            mask,
        )

        def mixture(a):
            combine = chosen * probabilities(a["x"], a["router"])
            return numpy_mixture(combine, a["x"], a["kernel"], a["bias"])

        expected = token_loop.gradients(
            lambda a: (mixture(a) * cotangent).sum(), arrays
        )
        self.assert_relative(y, mixture(arrays))
        self.assert_relative(dx, expected["x"], 1e-4)
        self.assert_relative(router_gradient(dw), expected["router"], 1e-4)
        self.assert_relative(dw["expert_kernel"], expected["kernel"], 1e-4)

    def test_noise(self):
        kernel = keras.initializers.RandomNormal(seed=1)
        first, same = (
            self.make(noise_stddev=0.5, seed=3, kernel_initializer=kernel)
            for _ in range(2)
        )
        tokens = self.tokens()
        a = to_numpy(first(tokens, training=True))
        b = to_numpy(first(tokens, training=True))
        self.assertGreater(np.abs(a.probs - b.probs).max(), 1e-2)
        self.assertAllEqual(same(tokens, training=True).probs, a.probs)
        # The logits stay clean, and so does inference.
        self.assertAllClose(a.logits, b.logits)
        clean = to_numpy(first(tokens))
        self.assertAllClose(clean.logits, a.logits)
        softmax = np.array([token_loop.softmax(z) for z in clean.logits])
        self.assertAllClose(clean.probs, softmax)
        chosen = a.expert_indices != 4
        self.assertAllEqual(chosen, choose(a.probs, 1, 6))
        self.assertFalse(hasattr(self.make(), "seed_generator"))

    def test_sigmoid_and_one_expert(self):
        router = ExpertChoiceRouter(1, score_activation="sigmoid")
        routing = to_numpy(router(self.tokens()))
        self.assertAllEqual(routing.expert_indices, np.zeros((12, 1)))
        sigmoid = token_loop.sigmoid(routing.logits.astype(float))
        self.assert_relative(routing.expert_weights, sigmoid)

    @parameterized.parameters("batch", "sequence")
    def test_unknown_batch_size(self, per):
        router = self.make(per=per)
        layer = Sequences(router)
        inputs = keras.Input((4, 6))
        model = keras.Model(inputs, layer(inputs))
        self.assertEqual(model.output_shape, (None, 4, 4))
        x = self.tokens().reshape(3, 4, 6)
        expected = router(self.tokens(), num_sequences=3).expert_weights
        expected = ops.convert_to_numpy(expected).reshape(3, 4, 4)
        self.assertAllClose(model(x), expected)
        self.assertAllClose(model.predict(x, verbose=0), expected)

    def test_config(self):
        self.assertTrue(ExpertChoiceRouter.looks_ahead)
        router = self.make(
            capacity_factor=1.5,
            capacity=3,
            capacity_multiple_of=2,
            per=2,
            score_activation="sigmoid",
            noise_stddev=0.1,
            jitter=0.1,
            use_bias=True,
            allow_lookahead=True,
        )
        self.run_class_serialization_test(router)
        config = router.get_config()
        for name in ("capacity_factor", "capacity_multiple_of", "per"):
            self.assertEqual(config[name], getattr(router, name))

    @parameterized.parameters(
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"capacity_factor": float("inf")}, "capacity_factor=inf"),
        ({"capacity": 0}, "capacity=0"),
        ({"capacity": 1.5}, "capacity=1.5"),
        ({"capacity_multiple_of": 0}, "capacity_multiple_of=0"),
        ({"per": "group"}, "per='group'"),
        ({"score_activation": "relu"}, "score_activation='relu'"),
        ({"noise_stddev": -1.0}, "noise_stddev=-1.0"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            ExpertChoiceRouter(4, **kwargs)

    def test_sequences_that_make_no_whole_groups(self):
        with self.assertRaisesRegex(ValueError, "per=2, num_sequences=3"):
            self.make(per=2)(self.tokens(), num_sequences=3)
