"""The bias that balances without a loss: whose load counts, and when."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter
from tests.replicas import together
from tests.test_case import TestCase

RATE = 0.01


def tokens(num_tokens=40, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_tokens, 6)).astype("float32")


def make(**kwargs):
    kwargs = {"expert_bias": True, "bias_update_rate": RATE, **kwargs}
    router = TopKRouter(5, 2, score_activation="sigmoid", **kwargs)
    router.build((None, 6))
    # Initializers draw differently on each backend.
    router.kernel.assign(np.random.default_rng(2).normal(size=(6, 5)))
    return router


def by_quantile(**kwargs):
    """With the default rate, which forgets the bias before."""
    return make(
        **{"bias_update": "quantile", "bias_update_rate": None, **kwargs}
    )


def bias_of(router):
    return np.array(ops.convert_to_numpy(router.expert_bias))


def steps(router, batches, bias=0.0):
    """The bias after these batches by algorithm 1, one token at a time."""
    kernel = ops.convert_to_numpy(router.kernel).astype("float64")
    bias = np.zeros(5) + bias
    for batch in batches:
        counts = np.zeros(5)
        for token in batch.astype("float64"):
            scores = 1 / (1 + np.exp(-token @ kernel)) + bias
            counts[np.argsort(-scores, kind="stable")[:2]] += 1
        bias = bias + RATE * np.sign(counts.mean() - counts)
    return bias


def scores_of(router, kind, batch):
    logits = batch.astype("float64") @ ops.convert_to_numpy(router.kernel)
    return logits if kind == "logits" else 1 / (1 + np.exp(-logits))


def equalizing(router, kind, batch, bias):
    """The bias that gives equal loads with the present thresholds."""
    scores = scores_of(router, kind, batch)
    thresholds = [sorted(row, reverse=True)[2] for row in scores + bias]
    result = []
    for column in scores.T:
        margins = sorted(column - thresholds, reverse=True)
        result.append(-margins[len(batch) * 2 // 5])
    return np.array(result)


class ExpertBiasTest(TestCase):
    def test_sign_rule(self):
        router = make()
        batches = [tokens(seed=s) for s in range(5)]
        for batch in batches:
            router(batch, training=True)
        self.assertAllClose(bias_of(router), steps(router, batches))
        self.assertGreater(np.abs(bias_of(router)).max(), 0.5 * RATE)

    def test_chooses_but_does_not_weigh(self):
        router = make()
        router.expert_bias.assign([0.0, 0.0, 0.0, 5.0, -5.0])
        routing = router(tokens())
        self.assertAllEqual(routing.expert_indices[:, 0], [3] * 40)
        chosen = np.take_along_axis(
            1 / (1 + np.exp(-ops.convert_to_numpy(routing.logits))),
            ops.convert_to_numpy(routing.expert_indices),
            axis=1,
        )
        self.assertAllClose(
            routing.expert_weights, chosen / chosen.sum(1, keepdims=True)
        )

    def test_centred(self):
        router = make(bias_update_centered=True)
        batch = tokens()
        router(batch, training=True)
        change = steps(router, [batch])
        self.assertAllClose(bias_of(router), change - change.mean())
        self.assertAllClose(np.mean(bias_of(router)), 0.0, atol=1e-7)

    def test_masked_tokens_do_not_count(self):
        router, batch = make(), tokens()
        mask = np.arange(40) % 3 > 0
        router(batch, mask=ops.array(mask), training=True)
        self.assertAllClose(bias_of(router), steps(router, [batch[mask]]))
        self.assertNotAllClose(bias_of(router), steps(router, [batch]))

    def test_neither_in_inference_nor_frozen(self):
        router = make()
        router(tokens())
        router(tokens(), training=False)
        self.assertAllEqual(bias_of(router), np.zeros(5))
        router.trainable = False
        router(tokens(), training=True)
        self.assertAllEqual(bias_of(router), np.zeros(5))
        router.trainable = True
        router(tokens(), training=True)
        self.assertGreater(np.abs(bias_of(router)).max(), 0.0)
        still = make(bias_update_rate=0.0)
        still(tokens(), training=True)
        self.assertAllEqual(bias_of(still), np.zeros(5))

    def test_experts_that_are_always_on_are_not_balanced(self):
        router = make(num_always_on=2)
        router(tokens(), training=True)
        self.assertAllEqual(bias_of(router)[3:], [0.0, 0.0])
        self.assertGreater(np.abs(bias_of(router)[:3]).max(), 0.0)

    @parameterized.parameters(False, True)
    def test_gradient_accumulation(self, jit_compile):
        # Four micro-batches a step of the optimizer make one step of the bias,
        # the same as the step of the whole batch.
        if jit_compile and keras.config.backend() == "torch":
            self.skipTest("torch.compile is tried in the tests of MoE")
        whole, micro = tokens(160), 40

        def trained(batch_size, accumulation):
            layer = MoE(
                router=make(bias_update_steps=accumulation or 1),
                experts=GLUExperts(
                    5,
                    3,
                    kernel_initializer=keras.initializers.RandomNormal(seed=2),
                ),
                losses=None,
            )
            model = keras.Sequential([layer])
            model.compile(
                keras.optimizers.SGD(
                    0.1, gradient_accumulation_steps=accumulation
                ),
                "mse",
                jit_compile=jit_compile,
            )
            model.fit(
                whole,
                np.ones_like(whole),
                batch_size=batch_size,
                epochs=3,
                shuffle=False,
                verbose=0,
            )
            return layer.router

        together, apart = trained(160, None), trained(micro, 4)
        self.assertAllClose(bias_of(apart), bias_of(together))
        self.assertAllClose(apart.kernel, together.kernel, atol=1e-6)
        self.assertGreater(np.abs(bias_of(apart)).max(), 0.0)
        # Midway nothing has happened yet.
        midway = make(bias_update_steps=4)
        for batch in np.split(whole, 4)[:3]:
            midway(batch, training=True)
        self.assertAllEqual(bias_of(midway), np.zeros(5))

    def test_saved_and_restored(self):
        layer = MoE(router=make(bias_update_steps=2), experts=GLUExperts(5, 3))
        model = keras.Sequential([keras.Input((6,)), layer])
        for seed in range(3):
            layer(tokens(seed=seed), training=True)
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        again = keras.saving.load_model(path)
        router = again.layers[-1].router
        self.assertAllEqual(router.expert_bias, layer.router.expert_bias)
        # The half of a step that was counted is not lost either.
        self.assertAllEqual(router.bias_counts, layer.router.bias_counts)
        self.assertEqual(float(router.bias_step), 1.0)
        layer(tokens(seed=7), training=True)
        again.layers[-1](tokens(seed=7), training=True)
        self.assertAllEqual(router.expert_bias, layer.router.expert_bias)

    def test_it_balances(self):
        # All tokens like expert 0 best at first.
        router = make(bias_update_rate=0.005)
        kernel = 0.3 * np.random.default_rng(3).normal(size=(6, 5))
        kernel[:, 0] = 0.3
        router.kernel.assign(kernel)
        batch = np.abs(tokens(200))

        def largest_load():
            indices = ops.convert_to_numpy(router(batch).expert_indices)
            return np.bincount(indices.reshape(-1), minlength=5).max() / 400

        self.assertGreater(largest_load(), 0.45)
        for _ in range(120):
            router(batch, training=True)
        self.assertLess(largest_load(), 0.23)

    def test_logits(self):
        router = make(expert_bias="logits")
        router.expert_bias.assign([0.0, 0.0, 0.0, 9.0, -9.0])
        batch = tokens()
        logits = batch @ ops.convert_to_numpy(router.kernel)
        ranked = logits + np.array([0.0, 0.0, 0.0, 9.0, -9.0])
        wanted = np.argsort(-ranked, axis=1, kind="stable")[:, :2]
        self.assertAllEqual(router(batch).expert_indices, wanted)

    @parameterized.parameters(True, "logits")
    def test_quantile_rule(self, kind):
        router = by_quantile(expert_bias=kind, bias_update_rate=0.25)
        bias = np.zeros(5)
        for seed in range(3):
            batch = tokens(43, seed)
            mask = np.random.default_rng(seed).random(43) < 0.7
            router(batch, mask=ops.array(mask), training=True)
            target = equalizing(router, kind, batch[mask], bias)
            self.assertGreater(np.abs(target - bias).max(), 0.05)
            bias = 0.75 * bias + 0.25 * target
            self.assertAllClose(bias_of(router), bias)

    def test_quantiles_centred_and_averaged(self):
        router = by_quantile(bias_update_centered=True, bias_update_steps=2)
        batches = [tokens(seed=s) for s in range(2)]
        zeros = np.zeros(5)
        target = np.mean(
            [equalizing(router, True, batch, zeros) for batch in batches],
            axis=0,
        )
        router(batches[0], training=True)
        self.assertAllEqual(bias_of(router), zeros)
        router(batches[1], training=True)
        self.assertAllClose(bias_of(router), target - target.mean())
        self.assertAllEqual(router.bias_counts, zeros)

    def test_quantiles_without_a_token(self):
        router = by_quantile()
        router(tokens(), training=True)
        before = bias_of(router)
        self.assertGreater(np.abs(before).max(), 0.01)
        router(tokens(), mask=ops.zeros((40,), "bool"), training=True)
        router(tokens(0), training=True)
        self.assertAllEqual(bias_of(router), before)

    def test_quantiles_and_experts_that_are_always_on(self):
        router = by_quantile(num_always_on=2)
        router(tokens(), training=True)
        self.assertAllEqual(bias_of(router)[3:], [0.0, 0.0])
        scores = scores_of(router, True, tokens())[:, :3]
        margins = scores - np.sort(scores, axis=1)[:, :1]
        wanted = -np.sort(margins, axis=0)[::-1][40 * 2 // 3]
        self.assertAllClose(bias_of(router)[:3], wanted)

    def test_quantiles_balance_in_a_few_steps(self):
        router = by_quantile()
        batch = np.abs(tokens(200))
        counts = None
        for _ in range(8):
            indices = router(batch, training=True).expert_indices
            flat = ops.convert_to_numpy(indices).reshape(-1)
            before, counts = counts, np.bincount(flat, minlength=5)
            if before is None:
                self.assertGreater(counts.max(), 120)
        self.assertAllClose(counts, [80] * 5, atol=8)

    @parameterized.parameters(
        ({"expert_bias": "probs"}, "expert_bias='probs'"),
        ({"bias_update_rate": -1.0}, "bias_update_rate=-1.0"),
        ({"bias_update_steps": 0}, "bias_update_steps=0"),
        ({"bias_update": "mean"}, "bias_update='mean'"),
        (
            {"bias_update": "quantile", "bias_update_rate": 1.5},
            "bias_update_rate=1.5",
        ),
        (
            {"bias_update": "quantile", "num_always_on": 3},
            "quantile.*top_k=2, 2 experts to choose from",
        ),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            make(**kwargs)


class SeveralDevicesTest(TestCase):
    @parameterized.product(rule=("sign", "quantile"), count=(1, 2))
    def test_the_tokens_of_all_devices_count(self, rule, count):
        """One step a call or every other; once a device has no token."""
        batches = [tokens(seed=s) for s in range(4)]
        masks = [np.random.default_rng(s).random(40) < 0.6 for s in range(4)]
        masks[3][25:] = False
        whole, first, second = (
            make(
                bias_update=rule, bias_update_steps=count, bias_update_rate=0.3
            )
            for _ in range(3)
        )

        def train(router, part):
            for batch, mask in zip(batches, masks, strict=True):
                own = ops.array(mask[part])
                router(batch[part], mask=own, training=True)

        train(whole, slice(None))
        together(
            lambda: train(first, slice(25)),
            lambda: train(second, slice(25, None)),
        )
        self.assertGreater(np.abs(bias_of(whole)).max(), 0.05)
        for router in (first, second):
            self.assertAllClose(bias_of(router), bias_of(whole), atol=1e-6)
