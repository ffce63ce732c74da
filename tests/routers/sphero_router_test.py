"""`SpheroRouter` against a NumPy loop, its noise, masks, errors and config."""

from unittest import mock

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import MixedExperts
from keras_moe.experts import MLPExperts
from keras_moe.layers import SoftMoE
from keras_moe.routers import SpheroRouter
from tests.routers.soft_router_test import MASK
from tests.routers.soft_router_test import SHAPE
from tests.routers.soft_router_test import inputs
from tests.test_case import TestCase
from tests.token_loop import softmax


def entmax15(z):
    """By bisection of the threshold, in float64."""
    z = z / 2
    low, high = z.max() - 1, z.max()
    for _ in range(80):
        tau = (low + high) / 2
        above = np.square(np.maximum(z - tau, 0)).sum() > 1
        low, high = (tau, high) if above else (low, tau)
    return np.square(np.maximum(z - low, 0))


def unit(v):
    return v / np.linalg.norm(v)


def loop(x, router, mask=None, noise=0.0):
    """`(logits, dispatch, combine)` of `(B, L, D)`, one by one."""
    w = {
        v.name: ops.convert_to_numpy(v).astype("float64")
        for v in router.trainable_variables
    }
    kernel, x = w["slot_kernel"], x.astype("float64")
    shape = (*x.shape[:2], *kernel.shape[1:])
    logits, dispatch, combine = (np.zeros(shape) for _ in range(3))
    mask = np.ones(x.shape[:2], bool) if mask is None else mask
    noise = np.broadcast_to(noise, shape)
    for b, t, e, p in np.ndindex(*shape):
        slot = kernel[:, e, p]
        if router.normalize_slots:
            slot = slot - slot.mean()
            slot = slot / np.sqrt(np.mean(slot**2) + 1e-5)
            slot = slot * w["slot_gain"] + w["slot_bias"]
        if mask[b, t]:
            logits[b, t, e, p] = unit(x[b, t]) @ unit(slot)
    first = logits / w["dispatch_temperature"] + noise
    second = logits / w["combine_temperature"] + noise
    for b in range(len(x)):
        real = np.flatnonzero(mask[b])
        for t in real:
            flat = entmax15(second[b, t].reshape(-1))
            combine[b, t] = flat.reshape(shape[2:])
        for e, p in np.ndindex(*shape[2:]):
            dispatch[b, real, e, p] = softmax(first[b, real, e, p])
    return logits, dispatch, combine


def make(**kwargs):
    kwargs = {"num_experts": 3, "slots_per_expert": 2, **kwargs}
    router = SpheroRouter(name="router", **kwargs)
    router.build((None, None, SHAPE[-1]))
    rng = np.random.default_rng(3)
    for variable in router.trainable_variables:
        if variable.name != "slot_kernel":
            variable.assign(rng.uniform(0.1, 0.5, size=variable.shape))
    return router


class SpheroRouterTest(TestCase):
    def assert_routing(self, routing, wanted):
        for actual, expected in zip(routing[:3], wanted, strict=True):
            self.assertDType(actual, "float32")
            self.assert_relative(actual, expected)

    @parameterized.parameters(True, False)
    def test_loop(self, normalize_slots):
        router, x = make(normalize_slots=normalize_slots), inputs()
        routing = router(x)
        self.assert_routing(routing, loop(x, router))
        self.assertAllClose(routing.inputs, x)  # as they are
        combine = ops.convert_to_numpy(routing.combine_weights)
        self.assertTrue((combine == 0).any())
        self.assertAllClose(combine.sum((2, 3)), np.ones(SHAPE[:2]), atol=1e-5)
        masked = router(x, mask=ops.array(MASK))
        self.assert_routing(masked, loop(x, router, MASK))

    def test_noise(self):
        """The same is added to both, after the temperatures."""
        x, noise = inputs(), inputs(1, (2, 4, 3, 2))
        router = make(noise_stddev=0.7)
        draw = mock.Mock(
            side_effect=lambda shape, stddev, **_: ops.array(stddev * noise)
        )
        with mock.patch.object(keras.random, "normal", draw):
            noisy = router(x, training=True)
        self.assert_routing(noisy, loop(x, router, noise=0.7 * noise))
        self.assertEqual(draw.call_count, 1)
        self.assert_routing(router(x), loop(x, router))

    def test_start(self):
        router = SpheroRouter(4, 2, temperature=0.25)
        router.build((None, None, 16))
        kernel = ops.convert_to_numpy(router.slot_kernel).reshape(16, 8)
        self.assertAllClose(kernel.T @ kernel, np.eye(8), atol=1e-5)
        for name in ("dispatch_temperature", "combine_temperature"):
            value = ops.convert_to_numpy(getattr(router, name))
            self.assertAllClose(value, 0.25)

    def test_in_a_layer(self):
        """All weights get a gradient; saved and loaded."""
        layer = SoftMoE(
            router=SpheroRouter(4, noise_stddev=0.1, name="router"),
            experts=MixedExperts(
                [MLPExperts(2, 8, name="core"), MLPExperts(2, 3, name="small")],
                name="experts",
            ),
        )
        x = inputs()
        layer.build(x.shape)
        cotangent = inputs(5)
        _, _, gradients = self.outputs_and_gradients(layer, x, cotangent)
        for name in ("slot_kernel", "slot_bias", "combine_temperature"):
            gradient = gradients[f"router/{name}"]
            self.assertGreater(np.abs(gradient).max(), 1e-4, name)
        model = keras.Sequential([keras.Input(SHAPE[1:]), layer])
        wanted = model.predict(x, verbose=0)
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        self.assert_relative(keras.saving.load_model(path)(x), wanted)

    def test_config(self):
        kwargs = {
            "num_experts": 3,
            "slots_per_expert": 2,
            "normalize_slots": False,
            "alpha": 1.2,
            "temperature": 0.3,
            "epsilon": 1e-3,
            "noise_stddev": 0.5,
            "gumbel_noise": 0.25,
            "seed": 7,
        }
        router = SpheroRouter(**kwargs)
        copy = SpheroRouter.from_config(router.get_config())
        self.assertEqual(copy.get_config(), router.get_config())
        for name, value in kwargs.items():
            self.assertEqual(getattr(copy, name), value)

    @parameterized.parameters(
        ({"num_experts": 0}, "num_experts=0"),
        ({"alpha": 1.0}, "`alpha` must be a number above 1"),
        ({"temperature": 0}, "`temperature` must be positive"),
        ({"normalize_slots": 1}, "`normalize_slots` must be"),
        ({"epsilon": 0}, "`epsilon` must be positive"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            SpheroRouter(**{"num_experts": 3, **kwargs})
