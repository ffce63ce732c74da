"""How `MoE` is made, saved and misused, and parts of one's own."""

import os

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

import keras_moe
from keras_moe.experts import GLUExperts
from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.routers import Routing
from keras_moe.routers import TopKRouter
from tests import token_loop
from tests.moe.moe_test import SHAPE
from tests.moe.moe_test import inputs
from tests.moe.moe_test import make
from tests.moe.moe_test import weights_of
from tests.test_case import TestCase


class ConfigTest(TestCase):
    def test_short_and_long_form(self):
        layer = MoE(
            num_experts=6,
            intermediate_dim=7,
            top_k=3,
            activation="relu",
            experts="mlp",
            losses="load_balancing",
        )
        self.assertEqual((layer.router.num_experts, layer.router.top_k), (6, 3))
        self.assertIsInstance(layer.experts, MLPExperts)
        self.assertEqual(layer.experts.intermediate_dim, 7)
        self.assertEqual(layer.experts.activation, keras.activations.relu)
        self.assertLen(layer.routing_losses, 1)
        layer = MoE(router="switch", num_experts=6, intermediate_dim=7)
        self.assertEqual(layer.router.top_k, 1)
        self.assertIsInstance(layer.experts, GLUExperts)
        layer = MoE(router=TopKRouter(5), intermediate_dim=7)
        self.assertEqual(layer.experts.num_experts, 5)

    @parameterized.named_parameters(
        ("short", {"num_experts": 4, "intermediate_dim": 8}, 4),
        (
            "long",
            {
                "num_experts": 4,
                "router": "switch",
                "experts": "mlp",
                "intermediate_dim": 8,
                "shared_experts_mode": "gate",
                "capacity_factor": 1.25,
                "eval_capacity_factor": 2.0,
                "drop_policy": "weight",
                "statistics": "summary",
            },
            9,
        ),
    )
    def test_layer_contract(self, kwargs, num_trainable):
        if "shared_experts_mode" in kwargs:
            kwargs["shared_experts"] = GLUExperts(1, 4, name="shared")
        self.run_layer_test(
            MoE,
            init_kwargs=kwargs,
            input_shape=(2, 3, 6),
            expected_output_shape=(2, 3, 6),
            expected_num_trainable_weights=num_trainable,
            expected_num_non_trainable_weights=4,
            expected_num_seed_generators="router" in kwargs,
            expected_num_losses=0,
            supports_masking=True,
        )

    def test_parts_pass_the_layer_test(self):
        self.run_layer_test(
            TopKRouter,
            init_kwargs={"num_experts": 4, "jitter": 0.1},
            input_shape=(6, 5),
            expected_num_trainable_weights=1,
            expected_num_seed_generators=1,
            run_training_check=False,  # its output is no single tensor
        )
        for cls, count in ((GLUExperts, 3), (MLPExperts, 4)):
            self.run_layer_test(
                cls,
                init_kwargs={"num_experts": 2, "intermediate_dim": 8},
                input_data=ops.ones((6, 5)),
                call_kwargs={"group_sizes": ops.array([4, 2], "int32")},
                expected_output_shape=(6, 5),
                expected_num_trainable_weights=count,
                # These two would call it without `group_sizes`.
                run_training_check=False,
                run_mixed_precision_check=False,
            )

    def test_save_and_load(self):
        x = keras.Input((None, 5))
        y = MoE(num_experts=4, intermediate_dim=3, name="first")(x)
        second = MoE(
            router=TopKRouter(4, 2, jitter=0.1, name="router"),
            experts=MLPExperts(4, 3, name="experts"),
            capacity_factor=1.0,
            shared_experts=GLUExperts(2, 3, name="shared"),
            shared_experts_mode="gate",
            name="second",
        )
        model = keras.Model(x, second(y))
        model.compile("adam", "mse")
        model.fit(inputs(), inputs(1), verbose=0)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.models.load_model(path)
        self.assertAllEqual(loaded(inputs()), model(inputs()))
        self.assertEqual(
            [v.path for v in loaded.weights],
            [v.path for v in model.weights],
        )
        paths = [v.path for v in loaded.trainable_variables]
        self.assertIn("first/router/kernel", paths)
        self.assertIn("first/experts/gate_kernel", paths)
        for old, new in zip(model.weights, loaded.weights, strict=True):
            self.assertAllEqual(old, new)
        # And the loaded one goes on as the original does.
        loaded.fit(inputs(), inputs(1), verbose=0)
        self.assertNotAllClose(loaded(inputs()), model(inputs()))

    def test_default_names(self):
        keras.utils.clear_session(free_memory=False)
        names = [MoE(num_experts=2, intermediate_dim=2).name for _ in range(3)]
        self.assertEqual(names, ["moe", "moe_1", "moe_2"])

    @parameterized.parameters(
        ({}, "`num_experts` must be given"),
        ({"num_experts": 4}, "`intermediate_dim` must be given"),
        (
            {"num_experts": 4, "top_k": 5, "intermediate_dim": 2},
            "top_k=5, num_experts=4",
        ),
        (
            {"num_experts": 4, "intermediate_dim": 2, "activation": "sillu"},
            "sillu",
        ),
        (
            {"num_experts": 4, "intermediate_dim": 2, "router": "best"},
            "router='best'",
        ),
        (
            {"num_experts": 4, "intermediate_dim": 2, "experts": "best"},
            "experts='best'",
        ),
        (
            {"num_experts": 4, "intermediate_dim": 2, "losses": "best"},
            "'best'",
        ),
        (
            {
                "num_experts": 4,
                "intermediate_dim": 2,
                "capacity_factor": 0.0,
            },
            "capacity_factor=0.0",
        ),
        (
            {
                "num_experts": 4,
                "intermediate_dim": 2,
                "drop_policy": "fair",
            },
            "drop_policy='fair'",
        ),
        (
            {"num_experts": 4, "intermediate_dim": 2, "statistics": "all"},
            "statistics='all'",
        ),
        (
            {
                "num_experts": 4,
                "intermediate_dim": 2,
                "shared_experts_mode": "gate",
            },
            "needs `shared_experts`",
        ),
        (
            {
                "num_experts": 4,
                "intermediate_dim": 2,
                "router": keras.layers.Dense,
            },
            "must be a name or a layer",
        ),
        (
            {"num_experts": 4, "intermediate_dim": 2, "shared_experts": 1},
            "shared_experts=1",
        ),
        (
            {
                "num_experts": 4,
                "intermediate_dim": 2,
                "capacity_factor": "1.25",
            },
            "capacity_factor='1.25'",
        ),
        (
            {
                "num_experts": 4,
                "intermediate_dim": 2,
                "losses": keras_moe.losses.RouterZLoss,
            },
            "RouterZLoss",
        ),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            MoE(**kwargs)

    def test_parts_that_do_not_fit_together(self):
        with self.assertRaisesRegex(
            ValueError,
            "router.num_experts=4, experts.num_experts=5",
        ):
            MoE(router=TopKRouter(4), experts=GLUExperts(5, 2))
        with self.assertRaisesRegex(ValueError, "num_experts=3, router.num_"):
            MoE(3, router=TopKRouter(4), experts=GLUExperts(4, 2))
        with self.assertRaisesRegex(ValueError, "`top_k` can only be given"):
            MoE(
                router=TopKRouter(4), experts="mlp", intermediate_dim=2, top_k=2
            )
        with self.assertRaisesRegex(ValueError, "`activation` can only be"):
            MoE(4, experts=GLUExperts(4, 2), activation="relu")
        with self.assertRaisesRegex(ValueError, "attribute `num_experts`"):
            MoE(4, intermediate_dim=2, router=keras.layers.Dense(4))

    def test_wrong_rank(self):
        for shape in ((5,), (3, None)):
            layer = MoE(num_experts=4, intermediate_dim=2)
            with self.assertRaisesRegex(ValueError, "inputs_shape="):
                layer.build(shape)
        with self.assertRaisesRegex(ValueError, "expected axis -1"):
            make()(keras.Input((4, 6)))
        with self.assertRaisesRegex(
            ValueError, r"shape \(12, 1\) for \(12, 5\)"
        ):
            make(shared_experts=keras.layers.Dense(1))(inputs())

    def test_float64(self):
        layer = MoE(num_experts=4, intermediate_dim=3, dtype="float64")
        self.assertEqual(layer.router.compute_dtype, "float64")
        if keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 unless told so as it starts.")
        x = inputs().astype("float64")
        out = layer(x)
        self.assertEqual(keras.backend.standardize_dtype(out.dtype), "float64")
        wanted, *_ = token_loop.moe(
            x.reshape(-1, 5), weights_of(layer), 2, "silu"
        )
        self.assert_relative(out, wanted.reshape(SHAPE), 1e-12)

    def test_an_implementation_of_another_backend(self):
        # It can be loaded, says so when it runs, and can be told another.
        for name in ("row_blocks", "grouped_mm"):
            if name not in keras_moe.ops.grouped_matmul_implementations():
                break
        experts = GLUExperts(4, 4, implementation=name)
        layer = MoE(experts=experts)
        with self.assertRaisesRegex(ValueError, f"implementation='{name}'"):
            layer(inputs())
        layer.experts.implementation = None
        self.assertEqual(tuple(layer(inputs()).shape), SHAPE)


@keras.saving.register_keras_serializable("keras_moe_tests")
class RoundRobinRouter(keras_moe.routers.Router):
    """A user's router: token t goes to expert t modulo E."""

    def call(self, tokens, mask=None, training=None):
        token = ops.arange(ops.shape(tokens)[0], dtype="int32")
        expert = ops.expand_dims(token % self.num_experts, -1)
        probs = ops.one_hot(expert[:, 0], self.num_experts, dtype="float32")
        return Routing(probs, probs, expert, ops.ones_like(expert, "float32"))


@keras.saving.register_keras_serializable("keras_moe_tests")
class ScaleExperts(keras_moe.experts.Experts):
    """A user's experts: each multiplies its rows by a number of its own."""

    def build(self, rows_shape):
        self.scale = self.add_bank("scale", (1, rows_shape[-1]))

    def call(self, rows, group_sizes, training=None):
        ones = ops.ones((ops.shape(rows)[0], 1), rows.dtype)
        return rows * self.grouped_dense(ones, group_sizes, self.scale)


@keras.saving.register_keras_serializable("keras_moe_tests")
class PlainExperts(keras.layers.Layer):
    """A user's experts without any base class of ours: all do nothing."""

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts

    def call(self, rows, group_sizes, training=None):
        return rows

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


class OwnPartsTest(TestCase):
    @parameterized.parameters(ScaleExperts, PlainExperts)
    def test_own_router_and_experts(self, experts):
        layer = MoE(
            router=RoundRobinRouter(3),
            experts=experts(3),
            statistics="per_expert",
        )
        model = keras.Sequential(
            [keras.Input((None, 5)), layer, keras.layers.Dense(1)]
        )
        x = inputs()
        scale = np.ones((3, 1, 5))
        if experts is ScaleExperts:
            scale = ops.convert_to_numpy(layer.experts.scale)
        wanted = x.reshape(-1, 5) * scale[np.arange(12) % 3, 0]
        self.assertAllClose(layer(x), wanted.reshape(SHAPE), atol=1e-6)
        model.compile("sgd", "mse")
        history = model.fit(x, x[..., :1], verbose=0).history
        load = history["moe_load_0"]
        self.assertAllClose(load, [1 / 3])
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.models.load_model(path)
        self.assertAllEqual(loaded(x), model(x))

    def test_an_own_loss(self):
        layer = make(losses=lambda routing, mask: 3.0 * ops.sum(routing.probs))
        layer(inputs(), training=True)
        values = [ops.convert_to_numpy(x) for x in layer.losses]
        self.assertAllClose(values, [36.0])

    def test_routers_must_route_all_tokens(self):
        class Short(RoundRobinRouter):
            def call(self, tokens, mask=None, training=None):
                return super().call(tokens[:-1], training=training)

        with self.assertRaisesRegex(ValueError, "for T tokens. Received: T=12"):
            MoE(router=Short(3), experts=PlainExperts(3))(inputs())

    def test_experts_must_keep_the_width(self):
        class Narrow(PlainExperts):
            def call(self, rows, group_sizes, training=None):
                return rows[:, :2]

        layer = MoE(router=RoundRobinRouter(3), experts=Narrow(3))
        with self.assertRaisesRegex(ValueError, "width 2, expected 5"):
            layer(inputs())
