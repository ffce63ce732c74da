import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import routers
from tests import token_loop
from tests.test_case import TestCase

OPTIONS = {
    "softmax": {},
    "softmax_unnormalized": {"normalize_weights": False},
    "softmax_after": {"score_after_selection": True},
    "sigmoid": {"score_activation": "sigmoid"},
    "sigmoid_unnormalized": {
        "score_activation": "sigmoid",
        "normalize_weights": False,
    },
    "sigmoid_after": {
        "score_activation": "sigmoid",
        "score_after_selection": True,
        "normalize_weights": False,
    },
}


def options_of_loop(options):
    return {
        "score": options.get("score_activation", "softmax"),
        "after": options.get("score_after_selection", False),
        "norm": options.get("normalize_weights", True),
    }


class TopKRouterTest(TestCase):
    def tokens(self, num_tokens=20, dim=6):
        rng = np.random.default_rng(1)
        return rng.normal(size=(num_tokens, dim)).astype("float32")

    @parameterized.named_parameters((n, o) for n, o in OPTIONS.items())
    def test_against_token_loop(self, options):
        tokens = self.tokens()
        router = routers.TopKRouter(
            5,
            3,
            use_bias=True,
            bias_initializer="normal",
            kernel_initializer="normal",
            **options,
        )
        routing = router(tokens)
        weights = {
            "router/kernel": ops.convert_to_numpy(router.kernel).astype(float),
            "router/bias": ops.convert_to_numpy(router.bias).astype(float),
        }
        logits, probs, indices, expert_weights = token_loop.route(
            tokens.astype(float), weights, 3, **options_of_loop(options)
        )
        self.assert_relative(routing.logits, logits)
        self.assert_relative(routing.probs, probs)
        self.assertAllEqual(routing.expert_indices, indices)
        self.assert_relative(routing.expert_weights, expert_weights)

    def test_by_hand(self):
        router = routers.TopKRouter(
            3, 2, temperature=0.5, weight_scale=10.0, normalize_weights=False
        )
        router.build((None, 1))
        router.kernel.assign([[0.0, np.log(2.0) / 2, np.log(4.0) / 2]])
        routing = router(ops.ones((1, 1)))
        # Logits / 0.5 are 0, log 2, log 4: probabilities 1/7, 2/7, 4/7.
        self.assertAllClose(routing.probs, [[1 / 7, 2 / 7, 4 / 7]])
        self.assertAllEqual(routing.expert_indices, [[2, 1]])
        self.assertAllClose(routing.expert_weights, [[40 / 7, 20 / 7]])

    def test_equal_logits_choose_the_first(self):
        router = routers.TopKRouter(6, 2, kernel_initializer="zeros")
        indices = router(self.tokens()).expert_indices
        self.assertAllEqual(indices, [[0, 1]] * 20)

    def test_float32_in_every_policy(self):
        for policy in ("mixed_float16", "mixed_bfloat16", "float16"):
            for make in (
                lambda p: routers.TopKRouter(4, 2, dtype=p, seed=3),
                self.under_global_policy,
            ):
                router = make(policy)
                tokens = ops.cast(self.tokens(), "float16")
                routing = router(tokens)
                self.assertEqual(router.kernel.dtype, "float32")
                for field in ("logits", "probs", "expert_weights"):
                    dtype = getattr(routing, field).dtype
                    self.assertEqual(
                        keras.backend.standardize_dtype(dtype), "float32"
                    )
                # Nothing was rounded on the way.
                self.assert_relative(
                    routing.logits,
                    ops.convert_to_numpy(tokens).astype(float)
                    @ ops.convert_to_numpy(router.kernel).astype(float),
                    1e-6,
                )

    def under_global_policy(self, policy):
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            return routers.TopKRouter(4, 2, seed=3)
        finally:
            keras.config.set_dtype_policy(before)

    def test_jitter_and_noise(self):
        tokens = ops.ones((50, 6))
        for name, value in (("jitter", 0.1), ("noise_stddev", 1.0)):
            router, same = (
                routers.TopKRouter(
                    4, 2, seed=7, kernel_initializer="ones", **{name: value}
                )
                for _ in range(2)
            )
            seen = []
            for _ in range(2):
                routing = router(tokens, training=True)
                # Noise shows in the probabilities, up to a constant a token;
                # the logits are without.
                probs = ops.convert_to_numpy(ops.log(routing.probs))
                logits = ops.convert_to_numpy(routing.logits)
                seen.append(logits if name == "jitter" else probs)
            first, second = seen
            self.assertGreater(np.abs(first - second).max(), 1e-3)
            again = same(tokens, training=True)
            again = again.logits if name == "jitter" else ops.log(again.probs)
            self.assertAllEqual(again, first)
            # Six ones times a kernel of ones.
            self.assertAllClose(router(tokens).logits, np.full((50, 4), 6.0))
            if name == "jitter":
                # The same for all experts, within 10 %.
                self.assertAllClose(np.ptp(first, axis=1), np.zeros(50))
                self.assertBetween(np.abs(first - 6).max(), 0.05, 0.6)
            else:
                self.assertAllClose(logits, np.full((50, 4), 6.0))
                centred = first - first.mean(axis=1, keepdims=True)
                self.assertBetween(np.std(centred), 0.7, 1.0)
        self.assertFalse(hasattr(routers.TopKRouter(4, 2), "seed_generator"))

    def test_initial_logits_are_small(self):
        router = routers.TopKRouter(64, 2)
        router.build((None, 512))
        # Variance 0.1 / fan_in.
        deviation = np.std(ops.convert_to_numpy(router.kernel))
        self.assertAllClose(deviation, np.sqrt(0.1 / 512), rtol=0.02)

    def test_config_and_symbolic_call(self):
        router = routers.TopKRouter(
            4, 2, jitter=0.1, seed=1, kernel_regularizer="l2", temperature=2.0
        )
        self.run_class_serialization_test(router)
        inputs = keras.Input((6,))
        routing = router(inputs)
        self.assertEqual(routing.expert_indices.shape, (None, 2))
        model = keras.Model(inputs, routing.probs)
        self.assertAllClose(ops.sum(model(self.tokens()), axis=-1), np.ones(20))

    def test_learned_scale(self):
        for kind, scale in (("expert", [1.0, 2.0, 3.0]), ("global", [5.0])):
            router = routers.TopKRouter(3, 2, learned_scale=kind)
            router.build((None, 6))
            plain = router(self.tokens())
            router.scale.assign(scale)
            scaled = router(self.tokens())
            factors = np.broadcast_to(scale, (3,))
            self.assertAllClose(
                scaled.expert_weights,
                ops.convert_to_numpy(plain.expert_weights)
                * factors[ops.convert_to_numpy(plain.expert_indices)],
            )

    def test_logit_softcap_and_input_normalization(self):
        router = routers.TopKRouter(
            4, logit_softcap=2.0, normalize_inputs=True, use_bias=True
        )
        router.build((None, 6))
        scale = np.arange(1.0, 7.0)
        router.kernel.assign(10 * np.eye(6, 4))
        router.input_scale.assign(scale)
        x = self.tokens().astype("float64")
        x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6) * scale
        wanted = 2 * np.tanh(10 * x[:, :4] / 2)
        self.assert_relative(router(self.tokens()).logits, wanted)

    def test_expert_dropout(self):
        router = routers.TopKRouter(
            4, 1, expert_dropout=0.25, seed=3, kernel_initializer="zeros"
        )
        tokens = ops.ones((4000, 6))
        self.assertAllEqual(router(tokens).expert_indices, [[0]] * 4000)
        indices = router(tokens, training=True).expert_indices
        shares = np.bincount(
            ops.convert_to_numpy(indices).reshape(-1), minlength=4
        )
        # Expert e if those before it are out, and the first if all are.
        wanted = [0.75 + 0.25**4, 0.75 / 4, 0.75 / 16, 0.75 / 64]
        self.assertAllClose(shares / 4000, wanted, atol=0.03)

    def test_always_on(self):
        router = routers.TopKRouter(
            5, 2, num_always_on=2, score_activation="sigmoid"
        )
        routing = router(self.tokens())
        self.assertEqual(tuple(routing.expert_indices.shape), (20, 4))
        self.assertAllEqual(routing.expert_indices[:, 2:], [[3, 4]] * 20)
        logits = ops.convert_to_numpy(routing.logits).astype("float64")
        best = np.argsort(-logits[:, :3], axis=1, kind="stable")[:, :2]
        self.assertAllEqual(routing.expert_indices[:, :2], best)
        scores = 1 / (1 + np.exp(-logits))
        chosen = np.take_along_axis(
            scores, ops.convert_to_numpy(routing.expert_indices), axis=1
        )
        self.assert_relative(
            routing.expert_weights, chosen / chosen.sum(axis=1, keepdims=True)
        )

    def test_groups_by_hand(self):
        router = routers.TopKRouter(
            6,
            2,
            score_activation="sigmoid",
            num_expert_groups=3,
            top_k_groups=1,
        )
        router.build((None, 6))
        router.kernel.assign(np.eye(6))
        # The best single expert is 0, the best pair 2 and 3.
        logits = ops.array([[3.0, -9.0, 2.0, 1.0, 0.0, 0.5]])
        self.assertAllEqual(router(logits).expert_indices, [[2, 3]])
        router.group_score = 1
        self.assertAllEqual(router(logits).expert_indices, [[0, 1]])

    def test_scores_that_saturate_are_told_apart(self):
        # In float32 the sigmoids of both are 1.
        router = routers.TopKRouter(2, 1, score_activation="sigmoid")
        router.build((None, 2))
        router.kernel.assign(np.eye(2))
        indices = router(ops.array([[30.0, 40.0]])).expert_indices
        self.assertAllEqual(indices, [[1]])

    def test_sampling(self):
        router = routers.TopKRouter(
            3, 1, gumbel_noise=1.0, noisy_weights=False, seed=3
        )
        router.build((None, 3))
        router.kernel.assign(np.eye(3))
        probs = np.array([0.5, 0.3, 0.2], "float32")
        tokens = np.tile(np.log(probs), (4000, 1))
        routing = router(tokens, training=True)
        indices = ops.convert_to_numpy(routing.expert_indices)[:, 0]
        self.assertAllClose(np.bincount(indices) / 4000, probs, atol=0.03)
        # The weights are the clean probabilities of what was drawn.
        self.assertAllClose(
            routing.expert_weights[:, 0], probs[indices], atol=1e-6
        )

    @parameterized.parameters(
        ({"num_experts": 4, "top_k": 5}, r"top_k=5, num_experts=4"),
        ({"num_experts": 4, "top_k": 0}, r"top_k=0, num_experts=4"),
        ({"num_experts": 4, "top_k": 1.5}, r"top_k=1.5"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_experts": 2.0}, "num_experts=2.0"),
        (
            {"num_experts": 4, "score_activation": "tanh"},
            "score_activation='tanh'",
        ),
        (
            {"num_experts": 4, "top_k": 1, "normalize_weights": True},
            "no gradient",
        ),
        (
            {"num_experts": 4, "top_k": 1, "score_after_selection": True},
            "no gradient",
        ),
        ({"num_experts": 4, "jitter": 1.0}, "jitter=1.0"),
        ({"num_experts": 4, "noise_stddev": -1.0}, "noise_stddev=-1.0"),
        ({"num_experts": 4, "temperature": 0.0}, "temperature=0.0"),
        ({"num_experts": 4, "normalize_epsilon": -1.0}, "normalize_epsilon"),
        ({"num_experts": 4, "normalize_order": 0.5}, "normalize_order=0.5"),
        ({"num_experts": 4, "logit_softcap": 0.0}, "logit_softcap=0.0"),
        ({"num_experts": 4, "expert_dropout": 1.0}, "expert_dropout=1.0"),
        ({"num_experts": 4, "gumbel_noise": -1.0}, "gumbel_noise=-1.0"),
        ({"num_experts": 4, "learned_scale": "all"}, "learned_scale='all'"),
        ({"num_experts": 4, "num_always_on": 3}, "num_always_on=3"),
        ({"num_experts": 4, "num_expert_groups": 3}, "num_expert_groups=3"),
        (
            {"num_experts": 4, "num_expert_groups": 4},
            "`group_score` must be at most the size of a group, 1",
        ),
        (
            {"num_experts": 4, "num_expert_groups": 2, "top_k_groups": 3},
            "top_k_groups=3, num_expert_groups=2",
        ),
        (
            {"num_experts": 8, "top_k": 3, "num_expert_groups": 4},
            "top_k_groups=1, num_expert_groups=4, top_k=3",
        ),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            routers.TopKRouter(**kwargs)

    def test_wrong_rank(self):
        with self.assertRaisesRegex(ValueError, r"tokens_shape=\(2, 3, 4\)"):
            routers.TopKRouter(4)(ops.ones((2, 3, 4)))
