"""`SoftRouter` against a NumPy loop, its noise, masks, errors and config."""

from unittest import mock

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.moe.moe import MoE
from keras_moe.routers.soft_router import SoftRouter
from tests.test_case import TestCase
from tests.token_loop import softmax

SHAPE = (2, 4, 5)  # (B, L, D)
MASK = np.array([[True, False, True, True], [False, True, True, False]])


def normalized(vector, kind, epsilon, gain):
    if kind == "l2":
        return vector / np.sqrt(np.sum(vector**2) + epsilon)
    if kind == "layer":
        vector = vector - vector.mean()
    return vector / np.sqrt(np.mean(vector**2) + epsilon) * gain


def soft_routing(
    x, weights, mask=None, noise=0.0, kind="l2", epsilon=1e-6, mixed=False
):
    """`(logits, dispatch, combine, inputs)` of `(B, L, D)`, one by one."""
    x, kernel = x.astype("float64"), weights["router/slot_kernel"]
    (batch, length, _), (_, num_experts, slots) = x.shape, kernel.shape
    mask = np.ones((batch, length), bool) if mask is None else mask
    shape = (batch, length, num_experts, slots)
    logits, dispatch, combine = (np.zeros(shape) for _ in range(3))
    inputs = np.zeros(x.shape)
    scale = weights.get("router/scale", 1.0)
    gains = [weights.get(f"router/{side}_gain") for side in ("token", "slot")]
    for b in range(batch):
        for t in range(length):
            token = x[b, t] if mask[b, t] else np.zeros(x.shape[-1])
            unit = normalized(token, kind, epsilon, gains[0])
            inputs[b, t] = unit if mixed else token
            for e in range(num_experts):
                for p in range(slots):
                    slot = normalized(kernel[:, e, p], kind, epsilon, gains[1])
                    logits[b, t, e, p] = scale * (unit @ slot)
    noisy = logits + noise
    for b in range(batch):
        real = np.flatnonzero(mask[b])
        for t in real:
            flat = softmax(noisy[b, t].reshape(-1))
            combine[b, t] = flat.reshape(num_experts, slots)
        for e in range(num_experts):
            for p in range(slots):
                if real.size:
                    dispatch[b, real, e, p] = softmax(noisy[b, real, e, p])
    return logits, dispatch, combine, inputs


def make(seed=3, dim=SHAPE[-1], **kwargs):
    """A built router of 3 experts with 2 slots, no weight of it a constant."""
    kwargs = {"num_experts": 3, "slots_per_expert": 2, **kwargs}
    router = SoftRouter(name="router", **kwargs)
    router.build((None, None, dim))
    rng = np.random.default_rng(seed)
    for variable in router.trainable_variables:
        if variable.name != "slot_kernel":
            variable.assign(rng.uniform(0.5, 2.5, size=variable.shape))
    return router


def weights_of(router):
    return {
        f"router/{v.name}": ops.convert_to_numpy(v).astype("float64")
        for v in router.trainable_variables
    }


def inputs(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


class SoftRouterTest(TestCase):
    def assert_routing(self, routing, expected):
        for actual, wanted in zip(routing, expected, strict=True):
            self.assertDType(actual, "float32")
            self.assert_relative(actual, wanted)

    def assert_finite(self, routing):
        for part in routing:
            self.assertTrue(np.isfinite(ops.convert_to_numpy(part)).all())

    @parameterized.named_parameters(
        ("l2", {}, {}),
        ("one_slot", {"slots_per_expert": 1}, {}),
        (
            "rms",
            {"normalization": "rms", "mix_normalized": True, "epsilon": 0.1},
            {"kind": "rms", "mixed": True, "epsilon": 0.1},
        ),
        ("layer", {"normalization": "layer"}, {"kind": "layer"}),
    )
    def test_loop(self, kwargs, loop):
        router = make(**kwargs)
        x, weights = inputs(), weights_of(router)
        self.assert_routing(router(x), soft_routing(x, weights, **loop))
        masked = soft_routing(x, weights, MASK, **loop)
        self.assert_routing(router(x, mask=ops.array(MASK)), masked)
        for name in ("dispatch", "combine"):
            actual = getattr(router(x), f"{name}_weights")
            total = ops.sum(actual, axis=1 if name == "dispatch" else (2, 3))
            self.assertAllClose(total, np.ones(total.shape), atol=1e-6)

    def test_noise(self):
        x = inputs()
        unit = inputs(1, (2, 4, 3, 2))
        router = make(noise_stddev=0.7)
        draw = mock.Mock(
            side_effect=lambda shape, stddev, **_: ops.array(stddev * unit)
        )
        with mock.patch.object(keras.random, "normal", draw):
            noisy = router(x, training=True)
        expected = soft_routing(x, weights_of(router), noise=0.7 * unit)
        self.assert_routing(noisy, expected)
        self.assertEqual(tuple(draw.call_args[0][0]), unit.shape)
        self.assert_routing(router(x), soft_routing(x, weights_of(router)))

    def test_gumbel_noise(self):
        x = inputs()
        uniform = np.random.default_rng(2).uniform(size=(2, 4, 3, 2))
        gumbel = -np.log(-np.log(uniform))
        router = make(gumbel_noise=0.5)
        draw = mock.Mock(return_value=ops.array(uniform, "float32"))
        with mock.patch.object(keras.random, "uniform", draw):
            noisy = router(x, training=True)
            clean = router(x)
        self.assertEqual(draw.call_count, 1)
        expected = soft_routing(x, weights_of(router), noise=0.5 * gumbel)
        self.assert_routing(noisy, expected)
        self.assert_routing(clean, soft_routing(x, weights_of(router)))
        # The ends of the interval, which a generator may return.
        for end in (0.0, 1.0):
            draw = mock.Mock(return_value=ops.full((2, 4, 3, 2), end))
            with mock.patch.object(keras.random, "uniform", draw):
                self.assert_finite(router(x, training=True))

    def test_each_call_draws_anew(self):
        router = make(noise_stddev=1.0, gumbel_noise=1.0, seed=4)
        first, second = (router(inputs(), training=True) for _ in range(2))
        self.assertNotAllClose(first[1], second[1])
        self.assertLen(router.non_trainable_variables, 1)
        self.assertEqual(make().non_trainable_variables, [])

    def test_masked_and_empty(self):
        router = make()
        x = inputs()
        x[~MASK] = np.nan
        mask = MASK & np.array([[True], [False]])  # nothing in example 1
        routing = router(x, mask=ops.array(mask))
        self.assert_finite(routing)
        routing = [ops.convert_to_numpy(part) for part in routing]
        for part in routing[1:]:
            self.assertAllEqual(part[~mask], np.zeros_like(part[~mask]))
        for shape in ((2, 0, 5), (0, 0, 5)):
            routing = router(np.zeros(shape, "float32"))
            self.assertEqual(
                tuple(routing.dispatch_weights.shape), (*shape[:2], 3, 2)
            )
        zero = router(np.zeros((1, 2, 5), "float32"))  # no direction
        self.assert_relative(zero.dispatch_weights, np.full((1, 2, 3, 2), 0.5))

    @parameterized.parameters(
        ("mixed_float16", "float32"), ("float64", "float64")
    )
    def test_precision(self, dtype, wide):
        if dtype == "float64" and keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 unless told so as it starts.")
        routing = make(dtype=dtype)(ops.cast(inputs() * 100, "float16"))
        self.assert_finite(routing)
        for part in routing:
            self.assertDType(part, wide)

    def test_slots_are_drawn_as_a_matrix(self):
        router = SoftRouter(64, slots_per_expert=4)
        router.build((None, None, 32))
        kernel = ops.convert_to_numpy(router.slot_kernel)
        self.assertEqual(kernel.shape, (32, 64, 4))
        self.assertAllClose(kernel.std(), 32**-0.5, rtol=0.05)
        self.assertEqual(ops.convert_to_numpy(router.scale), 1.0)

    def test_config(self):
        kwargs = {
            "num_experts": 3,
            "slots_per_expert": 2,
            "normalization": "rms",
            "epsilon": 1e-3,
            "mix_normalized": True,
            "noise_stddev": 0.5,
            "gumbel_noise": 0.25,
            "kernel_initializer": keras.initializers.RandomNormal(seed=1),
            "kernel_regularizer": keras.regularizers.L2(0.1),
            "scale_initializer": keras.initializers.Constant(2.0),
            "seed": 7,
            "allow_lookahead": True,
        }
        router = SoftRouter(**kwargs)
        copy = SoftRouter.from_config(router.get_config())
        self.assertEqual(copy.get_config(), router.get_config())
        for name, value in kwargs.items():
            self.assertIn(name, router.get_config())
            if isinstance(value, (int, float, str)):
                self.assertEqual(getattr(copy, name), value)
        self.assertEqual(copy.kernel_initializer.seed, 1)
        self.assertEqual(copy.kernel_regularizer.l2, 0.1)
        self.assertEqual(copy.scale_initializer.value, 2.0)
        router = SoftRouter(2, scale_initializer=copy.scale_initializer)
        router.build((None, None, 4))
        self.assertEqual(ops.convert_to_numpy(router.scale), 2.0)
        self.assertTrue(router.looks_ahead)

    def test_layer_contract(self):
        self.run_layer_test(
            SoftRouter,
            init_kwargs={"num_experts": 3, "gumbel_noise": 1.0},
            input_shape=(2, 4, 5),
            expected_num_trainable_weights=2,
            expected_num_seed_generators=1,
            run_training_check=False,  # it returns several tensors
        )

    @parameterized.parameters(
        ({"num_experts": 0}, "num_experts=0"),
        ({"slots_per_expert": 0}, "slots_per_expert=0"),
        ({"slots_per_expert": 1.5}, "slots_per_expert=1.5"),
        ({"normalization": "batch"}, "normalization='batch'"),
        ({"epsilon": 0}, "epsilon=0"),
        ({"noise_stddev": -1.0}, "noise_stddev=-1.0"),
        ({"gumbel_noise": -1.0}, "gumbel_noise=-1.0"),
        ({"noise_stddev": float("nan")}, "noise_stddev=nan"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            SoftRouter(**{"num_experts": 2, **kwargs})

    def test_errors_of_shapes(self):
        for shape in ((4, 5), (2, 3, 4, 5), (2, 4, None)):
            with self.assertRaisesRegex(ValueError, r"inputs_shape=\("):
                SoftRouter(2).build(shape)
        with self.assertRaisesRegex(ValueError, r"mask.shape=\(2, 4, 1\)"):
            make()(inputs(), mask=ops.ones((2, 4, 1), "bool"))
        with self.assertRaisesRegex(ValueError, "layers.SoftMoE"):
            MoE(router=SoftRouter(2), intermediate_dim=3)(inputs())
