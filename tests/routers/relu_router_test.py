import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.routers.relu_router import ReLURouter
from tests import token_loop
from tests.routers.dense_weights import DenseWeights
from tests.routers.variable_k_checks import LoopChecks
from tests.routers.variable_k_checks import VariableKChecks
from tests.routers.variable_k_checks import as_arrays
from tests.test_case import TestCase


class Parts:
    max_experts = None

    def make(self, num_experts, **kwargs):
        options = {
            "top_k": 1,
            "max_experts": self.max_experts and min(2, num_experts),
            "use_bias": True,
            "kernel_initializer": "glorot_normal",
            "bias_initializer": "glorot_normal",
            "initial_l1_coefficient": 0.01,
            **kwargs,
        }
        return ReLURouter(num_experts, **options)

    def loop(self, tokens, weights):
        combine = np.zeros((len(tokens), 5))
        for t, token in enumerate(tokens):
            w = np.maximum(token @ weights["kernel"] + weights["bias"], 0)
            if self.max_experts is not None:
                w[np.argsort(-w)[self.max_experts :]] = 0
            combine[t] = w
        return combine


class ReLURouterTest(Parts, VariableKChecks, TestCase):
    def l1(self, tokens, weights, mask=None, top_k=1):
        """The sum over all pairs of tokens, and the number of choices."""
        rows = np.flatnonzero(np.ones(len(tokens)) if mask is None else mask)
        total, number = 0.0, 0
        for e in range(5):
            w = [
                max(tokens[t] @ weights["kernel"][:, e] + weights["bias"][e], 0)
                for t in rows
            ]
            number += np.count_nonzero(w)
            total += np.count_nonzero(w) * sum(w)
        return 5 / (top_k * len(rows) ** 2) * total, number

    def test_loss_and_its_gradient(self):
        layer = DenseWeights(self.make(5, initial_l1_coefficient=2.0))
        layer.build((None, 6))
        tokens = self.tokens()
        mask = np.arange(12) != 4
        _, d_tokens, d_weights = self.outputs_and_gradients(
            layer,
            tokens,
            np.zeros((12, 5)),
            losses=True,
            mask=ops.convert_to_tensor(mask),
            training=True,
        )
        arrays = {"tokens": tokens, **as_arrays(layer)}
        # The counts carry no gradient, nor do they change in between.
        expected = token_loop.gradients(
            lambda arrays: 2 * self.l1(arrays["tokens"], arrays, mask)[0],
            arrays,
        )
        self.assert_relative(d_tokens, expected["tokens"], 1e-4)
        for name in ("kernel", "bias"):
            gradient = d_weights[f"{layer.router.name}/{name}"]
            self.assert_relative(gradient, expected[name], 1e-4)
        self.assertGreater(np.abs(expected["kernel"]).max(), 0.1)

    def test_loss_and_state_step_by_step(self):
        for top_k in (0.5, 4):
            router = self.make(5, top_k=top_k)
            coefficient = 0.01
            for seed in range(3):
                tokens = np.random.default_rng(seed).normal(size=(12, 6))
                router(tokens.astype("float32"), training=True)
                l1, number = self.l1(tokens, as_arrays(router), top_k=top_k)
                self.assertEqual(len(router.losses), 1)
                self.assertDType(router.losses[0], "float32")
                self.assert_relative(
                    ops.convert_to_numpy(router.losses[0]) / coefficient, l1
                )
                sparsity = 1 - number / (12 * 5)
                low = sparsity < 1 - top_k / 5
                self.assertEqual(low, top_k == 0.5)
                coefficient *= 1.2 if low else 1 / 1.2
                self.assertAllClose(router.l1_coefficient, coefficient)

    def test_not_in_inference(self):
        router = self.make(5)
        router(self.tokens())
        router(self.tokens(), training=False)
        self.assertEqual(router.losses, [])
        self.assertAllClose(router.l1_coefficient, 0.01)

    def test_frozen(self):
        router = self.make(5)
        router.trainable = False
        router(self.tokens(), training=True)
        self.assertEqual(len(router.losses), 1)
        self.assertAllClose(router.l1_coefficient, 0.01)

    def test_exactly_at_the_target(self):
        # Two of three: a sparsity of exactly 1 - top_k / E is no reason to
        # raise the coefficient, however it is rounded.
        router = ReLURouter(3, top_k=2, kernel_initializer="identity")
        tokens = np.array([[1, 2, 0], [0, 3, 3], [1, 0, 9]], "float32")
        router(tokens, training=True)
        self.assertAllClose(router.l1_coefficient, 1e-8 / 1.2, rtol=1e-5)
        self.assertAllClose(ops.sum(router(tokens).expert_weights), 19)

    def test_no_token_moves_nothing(self):
        router = self.make(5)
        router(self.tokens(0), training=True)
        router(self.tokens(), mask=ops.zeros((12,), "bool"), training=True)
        self.assertAllClose(router.l1_coefficient, 0.01)
        self.assertAllClose(sum(router.losses), 0.0)

    def test_coefficient_does_not_die(self):
        router = self.make(
            5, initial_l1_coefficient=1e-30, l1_multiplier=1e20, top_k=5
        )
        for _ in range(3):
            router(self.tokens(), training=True)
        self.assertAllClose(ops.log10(router.l1_coefficient), -30.0)

    @parameterized.parameters("mixed_bfloat16", "float64")
    def test_state_in_every_policy(self, policy):
        if policy == "float64" and keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 unless told so as it starts.")
        router = self.make(5, dtype=policy)
        router(self.tokens(), training=True)
        self.assertEqual(router.l1_coefficient.dtype, "float32")
        self.assertDType(router.losses[0], "float32")
        self.assertFalse(router.l1_coefficient.trainable)
        self.assertEqual(
            [v.name for v in router.non_trainable_variables],
            ["l1_coefficient"],
        )

    def test_fit_save_and_load(self):
        router = super().test_fit_save_and_load()
        # Eight steps that each move it up or down.
        steps = np.log(ops.convert_to_numpy(router.l1_coefficient) / 0.01)
        steps /= np.log(1.2)
        self.assertAllClose(steps, np.round(steps), atol=1e-3)
        self.assertIn(int(np.round(steps)), (-8, -6, -4, -2, 2, 4, 6, 8))

    def test_reaches_the_target(self):
        # A loss of zero but for the L1: only sparsity is left to learn.
        inputs = keras.Input((6,))
        layer = DenseWeights(
            self.make(5, initial_l1_coefficient=0.1, max_experts=None)
        )
        model = keras.Model(inputs, layer(inputs))
        model.compile(keras.optimizers.SGD(0.05), lambda y, p: 0.0 * ops.sum(p))
        x = np.random.default_rng(5).normal(size=(64, 6)).astype("float32")
        before = np.mean(model.predict(x, verbose=0) > 0)
        model.fit(x, np.zeros((64, 5)), batch_size=64, epochs=40, verbose=0)
        after = np.mean(model.predict(x, verbose=0) > 0)
        self.assertGreater(before, 0.4)
        self.assertLess(after, 0.3)

    def test_token_without_expert_gives_zero(self):
        router = ReLURouter(3, 1, kernel_initializer="identity")
        routing = router(-np.ones((2, 3), "float32"))
        self.assertAllEqual(routing.expert_indices, [[3, 3, 3]] * 2)
        self.assertAllEqual(routing.expert_weights, [[0, 0, 0]] * 2)

    def test_errors(self):
        for message, kwargs in (
            (r"`top_k` must be above 0 .*top_k=0, num_experts=5", {"top_k": 0}),
            (r"`top_k` must be .*top_k=6, num_experts=5", {"top_k": 6}),
            (r"`max_experts` must be .*max_experts=9", {"max_experts": 9}),
            (
                "`initial_l1_coefficient` must be .*initial_l1_coefficient=0$",
                {"initial_l1_coefficient": 0},
            ),
            (
                "`l1_multiplier` must be .*at least 1. .*l1_multiplier=0.5",
                {"l1_multiplier": 0.5},
            ),
        ):
            self.assert_raises_for(message, **kwargs)


class MaxExpertsTest(Parts, LoopChecks, TestCase):
    max_experts = 2
