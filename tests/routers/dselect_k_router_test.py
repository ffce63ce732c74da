import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.routers.dselect_k_router import DSelectKRouter
from tests import token_loop
from tests.routers.dense_weights import DenseWeights
from tests.routers.variable_k_checks import LoopChecks
from tests.routers.variable_k_checks import VariableKChecks
from tests.routers.variable_k_checks import as_arrays
from tests.test_case import TestCase


def step(x, gamma):
    if x <= -gamma / 2:
        return 0.0
    if x >= gamma / 2:
        return 1.0
    return 0.5 + 1.5 * x / gamma - 2 * x**3 / gamma**3


def selectors(token, weights, top_k, gamma, num_experts=5):
    """`(top_k, E)`, for a number of experts with codes of three bits."""
    z = np.zeros(3 * top_k) + weights["selector_bias"]
    if "selector_kernel" in weights:
        z = z + token @ weights["selector_kernel"]
    result = np.ones((top_k, num_experts))
    for s in range(top_k):
        for e in range(num_experts):
            for place, bit in enumerate(f"{e:03b}"):
                value = step(z[3 * s + place], gamma)
                result[s, e] *= value if bit == "1" else 1 - value
    return result


class Parts:
    top_k = 2
    gamma = 1.0
    per_token = True

    def make(self, num_experts, **kwargs):
        options = {
            "top_k": min(self.top_k, num_experts),
            "gamma": self.gamma,
            "per_token": self.per_token,
            "selector_initializer": "glorot_normal",
            "mixture_initializer": "glorot_normal",
            **kwargs,
        }
        return DSelectKRouter(num_experts, **options)

    def loop(self, tokens, weights):
        combine = np.zeros((len(tokens), 5))
        for t, token in enumerate(tokens):
            mixture = np.ones(1)
            if self.top_k > 1:
                logits = np.array(weights["mixture_bias"])
                if self.per_token:
                    logits = logits + token @ weights["mixture_kernel"]
                mixture = token_loop.softmax(logits)
            chosen = selectors(token, weights, self.top_k, self.gamma)
            combine[t] = mixture @ chosen
        return combine


class DSelectKRouterTest(Parts, VariableKChecks, TestCase):
    @parameterized.parameters(
        {"entropy_weight": 2.0, "unused_code_weight": 0.0},
        {"entropy_weight": 0.0, "unused_code_weight": 3.0},
    )
    def test_losses_and_their_gradients(
        self, entropy_weight, unused_code_weight
    ):
        layer = DenseWeights(
            self.make(
                5,
                gamma=2.0,
                entropy_weight=entropy_weight,
                unused_code_weight=unused_code_weight,
            )
        )
        layer.build((None, 6))
        # Small, since 1 / sum is as steep as one likes near unused codes.
        tokens = 0.3 * self.tokens()
        mask = np.arange(12) != 4

        def objective(arrays):
            total = 0.0
            for token in arrays["tokens"][mask]:
                r = selectors(token, arrays, 2, 2.0)
                total -= entropy_weight * np.sum(r * np.log(r + 1e-6))
                total += unused_code_weight * np.sum(1 / r.sum(axis=-1))
            return total / mask.sum()

        _, d_tokens, d_weights = self.outputs_and_gradients(
            layer,
            tokens,
            np.zeros((12, 5)),
            losses=True,
            mask=ops.convert_to_tensor(mask),
            training=True,
        )
        arrays = {"tokens": tokens, **as_arrays(layer)}
        expected = token_loop.gradients(objective, arrays)
        self.assert_relative(d_tokens, expected["tokens"], 1e-4)
        for path, gradient in d_weights.items():
            name = path.split("/")[-1]
            self.assert_relative(gradient, expected[name], 1e-4)
        self.assertGreater(np.abs(expected["selector_kernel"]).max(), 0.1)
        router = layer.router
        router(tokens, mask=ops.convert_to_tensor(mask), training=True)
        self.assertDType(router.losses[-1], "float32")
        self.assert_relative(router.losses[-1], objective(arrays))

    def test_which_losses(self):
        for num_experts, options, number in (
            (5, {}, 1),
            (5, {"unused_code_weight": 0}, 0),
            (4, {}, 0),
            (4, {"entropy_weight": 0.1}, 1),
            (5, {"entropy_weight": 0.1}, 2),
            (1, {"entropy_weight": 0.1}, 1),
        ):
            router = self.make(num_experts, **options)
            router(self.tokens(), training=True)
            self.assertEqual(len(router.losses), number)
            router = self.make(num_experts, **options)
            router(self.tokens(), training=False)
            self.assertEqual(router.losses, [])

    def test_sums(self):
        for num_experts in (1, 2, 4, 8):
            routing = self.make(num_experts)(self.tokens())
            total = ops.sum(routing.expert_weights, axis=-1)
            self.assert_relative(total, np.ones(12))
        routing = self.make(5)(self.tokens())
        total = ops.convert_to_numpy(ops.sum(routing.expert_weights, axis=-1))
        self.assertLess(total.min(), 0.95)
        self.assertLess(total.max(), 1.00001)

    def test_decided_selectors(self):
        # The codes of the experts 6 and 1, most significant bit first.
        router = DSelectKRouter(8, top_k=2, per_token=False)
        router.build((None, 6))
        router.selector_bias.assign([1, 1, -1, -9, -0.5, 0.5])
        router.mixture_bias.assign([0, np.log(3.0)])
        routing = router(self.tokens())
        expected = [[1, 6, 8, 8, 8, 8, 8, 8]] * 12
        self.assertAllEqual(routing.expert_indices, expected)
        self.assertAllClose(routing.expert_weights[:, :2], [[0.75, 0.25]] * 12)
        self.assertAllEqual(routing.expert_weights[:, 2:], np.zeros((12, 6)))
        self.assertAllClose(
            routing.logits[0, 0], np.log(1e-20).astype("float32")
        )

    def test_all_weight_on_unused_codes_is_finite(self):
        layer = DenseWeights(self.make(5, entropy_weight=1.0))
        layer.build((None, 6))
        layer.router.selector_kernel.assign(np.zeros((6, 6)))
        layer.router.selector_bias.assign(np.ones(6))
        outputs, _, d_weights = self.outputs_and_gradients(
            layer, self.tokens(), losses=True, training=True
        )
        self.assertAllEqual(outputs, np.zeros((12, 5)))
        for gradient in d_weights.values():
            self.assertTrue(np.all(np.isfinite(gradient)))

    def test_initial_selectors_are_undecided(self):
        router = DSelectKRouter(8, top_k=3, gamma=0.5, seed=1)
        routing = router(self.tokens() / 6)
        self.assertAllClose(routing.probs, np.full((12, 8), 1 / 8), atol=0.05)
        self.assertGreater(np.std(ops.convert_to_numpy(routing.probs)), 1e-4)

    def test_errors(self):
        for message, kwargs in (
            (r"`top_k` must be an int .*top_k=6, num_experts=5", {"top_k": 6}),
            (r"`top_k` must be an int .*top_k=1.5", {"top_k": 1.5}),
            ("`gamma` must be positive .* gamma=0$", {"gamma": 0}),
            ("`entropy_weight` must be .*=-1", {"entropy_weight": -1}),
            ("`unused_code_weight` must be .*=-2", {"unused_code_weight": -2}),
        ):
            self.assert_raises_for(message, **kwargs)


class OneSelectorTest(Parts, LoopChecks, TestCase):
    top_k = 1
    gamma = 1.5


class StaticTest(Parts, LoopChecks, TestCase):
    per_token = False

    def test_weights_and_gradients_against_a_loop(self):
        super().test_weights_and_gradients_against_a_loop()
        router = self.make(5)
        router.build((None, 6))
        self.assertEqual(
            [v.name for v in router.weights], ["selector_bias", "mixture_bias"]
        )
