import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from keras_moe.losses import RouterZLoss
from keras_moe.routers.hash_router import HashRouter
from keras_moe.routers.task_router import TaskRouter
from tests import token_loop
from tests.routers.logits_checks import DIM
from tests.routers.logits_checks import TOKENS
from tests.routers.logits_checks import LogitsChecks
from tests.test_case import TestCase

ALLOWED = [
    [True, True, False, True],
    [False, True, True, False],
    [True, True, True, True],
]


class TaskRouterTest(LogitsChecks, TestCase):
    @parameterized.parameters(1, 2)
    def test_in_a_functional_model(self, num_tasks):
        # Keras tries what is not known by calling with ones: no id of one task.
        layer = MoE(
            router=TaskRouter(4, num_tasks, jitter=0.1),
            experts=MLPExperts(4, 3),
            return_routing=True,
        )
        inputs = keras.Input((5, DIM))
        context = keras.Input((5,), dtype="int32")
        outputs, routing = layer(inputs, context=context)
        self.assertEqual(outputs.shape, (None, 5, DIM))
        model = keras.Model([inputs, context], [outputs, routing.probs])
        x = np.ones((2, 5, DIM), "float32")
        _, probs = model([x, np.full((2, 5), num_tasks - 1)])
        self.assertEqual(tuple(probs.shape), (10, 4))

    def test_symbolic_call_without_a_context(self):
        for router in (TaskRouter(4, 2), HashRouter(4, num_ids=2)):
            self.assertTrue(router.needs_context)
            name = type(router).__name__
            with self.assertRaisesRegex(
                ValueError, f"`context` must be given to {name}.*=None"
            ):
                router(keras.Input((DIM,)))
        with self.assertRaisesRegex(ValueError, r"shape=\(None, 3\)"):
            TaskRouter(4, 2)(
                keras.Input((DIM,)), context=keras.Input((3,), dtype="int32")
            )

    def make(self, **kwargs):
        return TaskRouter(4, 3, **{"allowed_experts": ALLOWED, **kwargs})

    def context(self, num_tokens=TOKENS):
        return np.resize([0, 1, 2, 1], num_tokens).astype("int32")

    def loop(self, token, task, weights, allowed=ALLOWED):
        kernel = weights["kernel"]
        if kernel.shape == (DIM, 4):
            logits = token @ kernel
        elif kernel.shape == (3, 4):
            logits = kernel[task]
        else:
            logits = token @ kernel[task]
        logits = logits + weights.get("bias", 0.0)
        able = [e for e in range(4) if allowed[task][e]]
        probs, finite = np.zeros(4), np.zeros(4)
        finite[able] = logits[able]
        probs[able] = token_loop.softmax(logits[able])
        chosen = sorted(able, key=lambda e: -logits[e])[:2]
        total = sum(probs[e] for e in chosen)
        return finite, probs, {e: probs[e] / total for e in chosen}

    @parameterized.parameters("per_task", "shared", "task")
    def test_against_loop(self, kernel):
        self.check_against_loop(kernel=kernel, use_bias=True)

    def test_all_allowed(self):
        self.assertEqual(np.sum(ALLOWED[2]), 4)
        tokens, tasks = self.tokens(), np.full(TOKENS, 2, "int32")
        free = self.make(allowed_experts=None, seed=1)
        limited = self.make(seed=1)
        self.assertAllEqual(
            free(tokens, context=tasks).logits,
            limited(tokens, context=tasks).logits,
        )

    @parameterized.parameters(
        {"expert_bias": True},
        {"expert_bias": "logits"},
        {"score_after_selection": True},
        {"score_activation": "sigmoid"},
        {"score_activation": "sqrt_softplus", "expert_bias": True},
        {"noise_stddev": 100.0},
        {"logit_softcap": 1.0, "temperature": 0.1},
    )
    def test_never_what_is_not_allowed(self, **kwargs):
        router = self.built(**kwargs)
        if router.bias_kind:
            router.expert_bias.assign([9.0, 0.0, -9.0, 9.0])
        tasks = self.context()
        routing = router(self.tokens(), context=tasks, training=True)
        indices = ops.convert_to_numpy(routing.expert_indices)
        for t in range(TOKENS):
            self.assertTrue(all(ALLOWED[tasks[t]][e] for e in indices[t]))
        self.assertAllEqual(
            np.isneginf(ops.convert_to_numpy(routing.logits)),
            ~np.array(ALLOWED)[tasks],
        )
        weights = ops.convert_to_numpy(routing.expert_weights)
        self.assertTrue(np.all(np.isfinite(weights)))

    def test_losses_are_finite(self):
        router = self.built()
        routing = router(self.tokens(), **self.kwargs())
        logits = ops.convert_to_numpy(routing.logits).astype("float64")
        expected = np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2)
        self.assert_relative(RouterZLoss(1.0)(routing, None), expected)
        loss = LoadBalancingLoss(1.0)(routing, None)
        self.assertTrue(np.isfinite(ops.convert_to_numpy(loss)))

    def test_initialization(self):
        router = TaskRouter(64, 2)
        router.build((None, 256))
        kernel = ops.convert_to_numpy(router.kernel)
        # As of two matrices, each with variance 0.1 / fan_in.
        self.assertAllClose(np.std(kernel), np.sqrt(0.1 / 256), rtol=0.02)
        self.assertGreater(np.abs(kernel[0] - kernel[1]).max(), 0.01)

    def test_compiled_ids_out_of_range_are_the_nearest(self):
        if keras.config.backend() == "torch":
            self.skipTest("Values are always known, or there are none")
        router = self.built()
        tokens = ops.convert_to_tensor(self.tokens())

        class OfIds(keras.Model):
            def __init__(self):
                super().__init__()
                self.router = router

            def call(self, ids):
                return self.router(tokens, context=ids).probs

        model = OfIds()
        ids = np.array([-5, 0, 1, 2, 3, 2**31 - 1, -1, 1, 1], "int32")
        model(self.context())  # JAX builds with values
        model.compile(jit_compile=True)
        probs = model.predict(ids, batch_size=TOKENS, verbose=0)
        self.assert_relative(
            probs,
            ops.convert_to_numpy(
                router(tokens, context=np.clip(ids, 0, 2)).probs
            ),
        )

    @parameterized.parameters(
        ({"num_tasks": 0}, "num_tasks=0"),
        ({"kernel": "own"}, "kernel='own'"),
        ({"allowed_experts": [[True] * 4] * 2}, r"shape \(2, 4\)"),
        ({"allowed_experts": [[1, 1, 1, 1]] * 3}, "dtype int64"),
        ({"top_k": 3}, r"top_k=3, num_always_on=0, allowed_experts\[1\]"),
        ({"top_k": 1, "num_always_on": 1}, r"allowed_experts\[1\]"),
        (
            {"num_expert_groups": 2, "top_k_groups": 1},
            "num_expert_groups=2",
        ),
        ({"expert_dropout": 0.5}, "expert_dropout=0.5"),
    )
    def test_errors(self, kwargs, message):
        kwargs = {"num_tasks": 3, "allowed_experts": ALLOWED, **kwargs}
        with self.assertRaisesRegex(ValueError, message):
            TaskRouter(4, **kwargs)

    @parameterized.parameters(
        (None, "context=None"),
        (np.zeros(9, "float32"), "dtype=float32"),
        (np.zeros((9, 1), "int32"), r"shape=\(9, 1\)"),
        (np.full(9, 3), "Received: 3, num_tasks=3"),
        (np.full(9, -1), "Received: -1, num_tasks=3"),
    )
    def test_errors_of_the_context(self, context, message):
        with self.assertRaisesRegex(ValueError, f"`context`.*{message}"):
            self.make()(self.tokens(), context=context)
