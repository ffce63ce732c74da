"""A causal layer gives a token the same alone, in a batch, and step by step."""

import inspect

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import routers
from keras_moe.dispatch import Dispatcher
from keras_moe.experts import GLUExperts
from keras_moe.layers import Capacity
from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter
from tests.test_case import TestCase

BATCH, LENGTH, DIM, EXPERTS = 3, 5, 6, 4
MORE = {
    "CosineRouter": {"projection_dim": 3},
    "HashRouter": {"num_ids": 20},
    "HierarchicalRouter": {"num_groups": 2, "experts_per_group": 2},
    "MLPRouter": {"projection_dim": 3},
    "TaskRouter": {"num_tasks": 3},
}
LOOK_AHEAD = (
    *("BASERouter", "ExpertChoiceRouter", "RandomRouter", "SinkhornRouter"),
    *("SoftRouter", "SpheroRouter"),
)


def names():
    for name, value in sorted(vars(routers).items()):
        base = name in ("Router", "LinearRouter", "RankingRouter")
        if inspect.isclass(value) and issubclass(value, routers.Router):
            if not base:
                yield name


def make(name, **kwargs):
    arguments = {"num_experts": EXPERTS, **MORE.get(name, {})}
    if name == "HierarchicalRouter":
        del arguments["num_experts"]
    router = getattr(routers, name)(**arguments)
    return MoE(
        router=router,
        experts=GLUExperts(EXPERTS, 3),
        capacity_factor=0.5,
        drop_policy="token",
        causal=True,
        **kwargs,
    )


class CausalTest(TestCase):
    @parameterized.parameters(*(n for n in names() if n not in LOOK_AHEAD))
    def test_token_by_token(self, name):
        layer = make(name)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(BATCH, LENGTH, DIM)).astype("float32")
        ids = rng.integers(0, 3, (BATCH, LENGTH)).astype("int32")

        def run(rows, positions):
            context = {}
            if layer.router.uses_context:
                context["context"] = ids[rows, positions]
            return ops.convert_to_numpy(layer(x[rows, positions], **context))

        every = slice(None)
        full = run(every, every)
        self.assertGreater(np.abs(full).max(), 0)
        steps = [run(every, slice(t, t + 1)) for t in range(LENGTH)]
        self.assertAllClose(np.concatenate(steps, 1), full, atol=1e-5)
        alone = [run(slice(b, b + 1), every) for b in range(BATCH)]
        self.assertAllClose(np.concatenate(alone), full, atol=1e-5)

    @parameterized.parameters(*LOOK_AHEAD)
    def test_routers_that_look_ahead_are_refused(self, name):
        with self.assertRaises(ValueError):
            make(name)

    def test_inference_drops_nothing_unless_it_is_told_to(self):
        for capacity, expected in (
            ({"capacity_factor": 1.0}, False),
            ({"capacity": Capacity(size=2, drop_policy="token")}, False),
            ({"capacity_factor": 1.0, "eval_capacity_factor": 2.0}, True),
        ):
            if "capacity" not in capacity:
                capacity["drop_policy"] = "token"
            layer = MoE(4, 8, causal=True, **capacity)
            self.assertTrue(layer.capacity.limits(training=True))
            self.assertEqual(layer.capacity.limits(training=False), expected)
            again = MoE.from_config(layer.get_config())
            self.assertEqual(again.capacity.limits(False), expected)
        # One that an earlier version saved goes on as it did.
        config = MoE(4, 8, causal=True, drop_policy="token").get_config()
        config["capacity"] = keras.saving.serialize_keras_object(
            Capacity(1.0, drop_policy="token")
        )
        self.assertTrue(MoE.from_config(config).capacity.limits(False))
        # A layer that is not causal does as it did in training.
        self.assertTrue(MoE(4, 8, capacity_factor=1.0).capacity.limits(False))

    def test_a_dispatcher_must_say_it(self):
        dispatcher = Dispatcher(Capacity(1.0, drop_policy="token"))
        with self.assertRaisesRegex(ValueError, "`eval_capacity_factor=math"):
            MoE(4, 8, causal=True, dispatcher=dispatcher)


class RouterInputsTest(TestCase):
    def test_router_and_experts_see_different_tensors(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, 3, 5)).astype("float32")
        seen = rng.normal(size=(2, 3, 7)).astype("float32")
        mask = np.array([[True, True, False], [True, False, True]])
        layer = MoE(4, 3)
        out = layer(x, router_inputs=seen, mask=mask)
        self.assertEqual(tuple(layer.router.kernel.shape), (7, 4))
        # The same experts and weights, from a router on its own.
        router = TopKRouter(4)
        router.build((None, 7))
        router.kernel.assign(layer.router.kernel)
        routing = router(ops.convert_to_tensor(seen.reshape(-1, 7)))
        routed = layer.route(x, router_inputs=seen)
        self.assertAllEqual(routed.expert_indices, routing.expert_indices)
        expected, _ = Dispatcher()(
            ops.convert_to_tensor(x.reshape(-1, 5)), routing, layer.experts
        )
        expected = ops.convert_to_numpy(expected).reshape(x.shape)
        self.assertAllClose(out, expected * mask[..., None], atol=1e-6)
        # In a functional model, of any batch, saved and loaded.
        a, b = keras.Input((None, 5)), keras.Input((None, 7))
        model = keras.Model([a, b], layer(a, router_inputs=b))
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assertAllClose(
            loaded([x, seen]), model([x, seen]), atol=1e-6, rtol=1e-6
        )

    def test_shape(self):
        with self.assertRaisesRegex(ValueError, "`router_inputs` must have"):
            MoE(4, 3)(np.ones((2, 3, 5)), router_inputs=np.ones((2, 4, 5)))
