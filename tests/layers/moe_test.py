"""What `MoE` computes: against a token loop, masked, saved, misused."""

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
from tests.test_case import TestCase

# Three batches of four tokens, four experts.
SHAPE = (3, 4, 5)
MASK = np.arange(12).reshape(3, 4) % 4 != 2


def make(top_k=2, experts="glu", activation="silu", use_bias=False, **kwargs):
    router = {
        k: kwargs.pop(k)
        for k in ("score_activation", "score_after_selection", "jitter")
        if k in kwargs
    }
    layer = MoE(
        router=TopKRouter(
            4,
            top_k,
            use_bias=use_bias,
            kernel_initializer=keras.initializers.RandomNormal(1.0, seed=1),
            bias_initializer="normal",
            name="router",
            **router,
        ),
        experts=keras_moe.experts.get(
            experts,
            num_experts=4,
            intermediate_dim=3,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=keras.initializers.GlorotUniform(seed=2),
            bias_initializer=keras.initializers.RandomNormal(seed=3),
            name="experts",
        ),
        **kwargs,
    )
    layer.build((None, SHAPE[-1]))
    return layer


def weights_of(layer):
    return {
        v.path.split("/", 1)[1]: ops.convert_to_numpy(v).astype("float64")
        for v in layer.trainable_variables
    }


def inputs(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


class TokenLoopTest(TestCase):
    """Outputs and all gradients, the balancing losses' among them."""

    @parameterized.named_parameters(
        ("glu_top_2", {}, {}),
        ("top_1", {"top_k": 1}, {"top_k": 1, "norm": False}),
        ("all_experts", {"top_k": 4}, {"top_k": 4}),
        (
            "mlp_with_biases",
            {"experts": "mlp", "activation": "tanh", "use_bias": True},
            {"activation": "tanh"},
        ),
        ("glu_with_biases", {"use_bias": True}, {}),
        ("sigmoid", {"score_activation": "sigmoid"}, {"score": "sigmoid"}),
        ("softmax_after", {"score_after_selection": True}, {"after": True}),
        ("masked", {"mask": MASK}, {}),
        ("capacity", {"capacity_factor": 0.6}, {"capacity": 4}),
        (
            "capacity_by_weight",
            {"capacity_factor": 0.6, "drop_policy": "weight"},
            {"capacity": 4, "policy": "weight"},
        ),
        (
            "masked_capacity",
            {"capacity_factor": 0.5, "mask": MASK},
            {"capacity": 3},
        ),
    )
    def test_outputs_and_gradients(self, kwargs, loop):
        mask = kwargs.pop("mask", None)
        layer = make(**kwargs)
        x, cotangent = inputs(0), inputs(1)
        flat_mask = None if mask is None else mask.reshape(-1)
        loop = {"top_k": 2, "activation": "silu", **loop}

        def forward(arrays):
            tokens = arrays["x"].reshape(-1, SHAPE[-1])
            return token_loop.moe(tokens, arrays, mask=flat_mask, **loop)

        def objective(arrays):
            outputs, _, logits, probs, indices = forward(arrays)
            balance = token_loop.load_balancing_loss(probs, indices, flat_mask)
            z = token_loop.router_z_loss(logits, flat_mask)
            total = np.sum(outputs * cotangent.reshape(-1, SHAPE[-1]))
            return total + 1e-2 * balance + 1e-3 * z

        arrays = {"x": x.astype("float64"), **weights_of(layer)}
        wanted, kept, *_ = forward(arrays)
        if "capacity" in loop:
            self.assertLess(kept.sum(), 2 * kept.shape[0])  # something dropped
        gradients = token_loop.gradients(objective, arrays)

        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer,
            x,
            cotangent,
            losses=True,
            training=True,
            mask=None if mask is None else ops.array(mask),
        )
        self.assert_relative(outputs, wanted.reshape(SHAPE))
        self.assert_relative(d_inputs, gradients.pop("x"))
        self.assertEqual(set(d_weights), set(gradients))
        for name, gradient in d_weights.items():
            self.assert_relative(gradient, gradients[name])


class BehaviourTest(TestCase):
    def assert_losses(self, layer, expected):
        values = [ops.convert_to_numpy(x) for x in layer.losses]
        self.assertAllEqual(values, expected)

    @parameterized.parameters(((7, 5),), ((3, 4, 5),), ((2, 3, 2, 5),))
    def test_ranks(self, shape):
        layer = make()
        x = inputs(shape=shape)
        out = layer(x)
        self.assertEqual(tuple(out.shape), shape)
        flat = layer(x.reshape(-1, 5))
        self.assertAllClose(out, ops.reshape(flat, shape), atol=1e-6)

    def test_mask_of_the_first_axes(self):
        x = inputs(shape=(2, 3, 2, 5))
        layer = make()
        mask = np.array([[True, False, True], [False, True, True]])
        out = ops.convert_to_numpy(layer(x, mask=ops.array(mask)))
        full = np.repeat(mask[..., None], 2, axis=-1)
        self.assertAllClose(out, layer(x, mask=ops.array(full)))
        self.assertAllEqual(out[~mask], np.zeros(out[~mask].shape))
        with self.assertRaisesRegex(ValueError, r"mask.shape=\(2, 3, 2, 5\)"):
            layer(x, mask=ops.ones((2, 3, 2, 5), "bool"))

    def test_masked_tokens_change_nothing(self):
        shared = GLUExperts(1, 3, use_bias=True, bias_initializer="ones")
        layer = make(capacity_factor=0.75, shared_experts=shared)
        results = []
        for junk in (0.0, 1e3, np.nan):
            x = inputs()
            x[~MASK] = junk
            results.append(
                self.outputs_and_gradients(
                    layer,
                    x,
                    losses=True,
                    mask=ops.array(MASK),
                    training=True,
                )
            )
        for outputs, d_inputs, d_weights in results:
            self.assertAllEqual(outputs[~MASK], np.zeros((3, 5)))
            self.assertAllEqual(d_inputs[~MASK], np.zeros((3, 5)))
            self.assertAllEqual(outputs, results[0][0])
            for name, gradient in d_weights.items():
                self.assertAllEqual(gradient, results[0][2][name])
                self.assertTrue(np.isfinite(gradient).all())

    def test_mask_arrives_from_an_embedding_and_passes_on(self):
        model = keras.Sequential(
            [
                keras.layers.Embedding(10, 8, mask_zero=True),
                MoE(num_experts=4, intermediate_dim=3),
                keras.layers.GlobalAveragePooling1D(),
            ]
        )
        short = model(np.array([[3, 4]]))
        padded = model(np.array([[3, 4, 0, 0, 0]]))
        self.assertAllClose(short, padded, atol=1e-6)

    def test_all_masked_and_empty_batches(self):
        for capacity_factor in (None, 1.0):
            layer = make(capacity_factor=capacity_factor)
            mask = ops.zeros((3, 4), "bool")
            out = layer(inputs(), mask=mask, training=True)
            self.assertAllEqual(out, np.zeros(SHAPE))
            self.assert_losses(layer, [0.0, 0.0])
            for shape in ((0, 4, 5), (3, 0, 5)):
                layer = make(capacity_factor=capacity_factor)
                out = layer(np.zeros(shape, "float32"), training=True)
                self.assertEqual(tuple(out.shape), shape)
                self.assert_losses(layer, [0.0, 0.0])

    def test_nan_stays_with_its_token(self):
        x = inputs()
        clean = ops.convert_to_numpy(make()(x))
        x[1, 2, 0] = np.nan
        out = ops.convert_to_numpy(make()(x))
        self.assertTrue(np.isnan(out[1, 2]).all())
        out[1, 2] = clean[1, 2]
        self.assertAllClose(out, clean, atol=1e-6)

    def test_capacity_in_training_and_inference(self):
        x = inputs()
        dropless = ops.convert_to_numpy(make()(x))
        tight = make(capacity_factor=0.5)
        self.assertNotAllClose(tight(x), dropless)
        for factor in (float("inf"), 4.0):
            layer = make(capacity_factor=0.5, eval_capacity_factor=factor)
            self.assertAllClose(layer(x), dropless, atol=1e-6)
            self.assertNotAllClose(layer(x, training=True), dropless)

    def test_losses_only_in_training(self):
        layer = make()
        layer(inputs())
        self.assertEqual(layer.losses, [])
        layer(inputs(), training=True)
        self.assertLen(layer.losses, 2)
        layer = make(losses=None)
        layer(inputs(), training=True)
        self.assertEqual(layer.losses, [])

    @parameterized.parameters(1, 3)
    def test_shared_experts_are_summed(self, count):
        shared = MLPExperts(count, 3, activation="tanh", name="shared")
        layer = make(shared_experts=shared, shared_experts_gate=True)
        weights = weights_of(layer)
        tokens = inputs().reshape(-1, 5).astype("float64")
        routed, *_ = token_loop.moe(tokens, weights, 2, "silu")
        for t, token in enumerate(tokens):
            gate = token_loop.sigmoid(token @ weights["shared_gate_kernel"])
            for e in range(count):
                routed[t] += gate * token_loop.expert(
                    token, weights, e, "tanh", prefix="shared"
                )
        self.assert_relative(layer(inputs()), routed.reshape(SHAPE))

    def test_any_layer_as_shared_expert(self):
        dense = keras.layers.Dense(5)
        layer = make(shared_experts=dense)
        x = inputs()
        self.assertAllClose(layer(x), make()(x) + dense(x), atol=1e-6)

    def test_jitter_does_not_reach_the_experts(self):
        # With all experts equal the routing does not matter.
        layer = make(jitter=0.5, use_bias=False, losses=None)
        for kernel in layer.experts.weights:
            first = ops.convert_to_numpy(kernel)[:1]
            kernel.assign(np.repeat(first, 4, axis=0))
        x = inputs()
        self.assertAllClose(layer(x, training=True), layer(x), atol=1e-6)

    def test_shared_experts_get_the_mask(self):
        norm = keras.layers.BatchNormalization(momentum=0.0)
        layer = make(shared_experts=norm)
        x = inputs()
        layer(x, mask=ops.array(MASK), training=True)
        self.assertAllClose(norm.moving_mean, x[MASK].mean(axis=0), atol=1e-6)

    def test_integer_inputs(self):
        x = np.arange(60).reshape(SHAPE) % 3
        self.assertAllClose(make()(x), make()(x.astype("float32")))

    def test_inside_a_users_layer(self):
        # On JAX, Keras infers its shapes with symbolic sizes.
        class Block(keras.layers.Layer):
            def __init__(self, moe):
                super().__init__()
                self.moe = moe

            def build(self, input_shape):
                self.moe.build(input_shape)

            def call(self, x, mask=None):
                return x + self.moe(x, mask=mask)

        for kwargs in (
            {},
            {"capacity_factor": 1.25, "drop_policy": "weight"},
            {"shared_experts_gate": True},
        ):
            for shape in ((5,), (4, 5), (None, 5), (None, None, 5)):
                if "shared_experts_gate" in kwargs:
                    kwargs["shared_experts"] = GLUExperts(2, 3)
                x = keras.Input(shape)
                moe = MoE(num_experts=4, intermediate_dim=3, **kwargs)
                model = keras.Model(x, Block(moe)(x))
                self.assertEqual(model.output_shape, (None, *shape))

    def test_route(self):
        layer = make()
        routing = layer.route(inputs())
        self.assertEqual(tuple(routing.expert_indices.shape), (12, 2))
        self.assertIsNone(layer.statistics.result())


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
                "shared_experts_gate": True,
                "capacity_factor": 1.25,
                "eval_capacity_factor": 2.0,
                "drop_policy": "weight",
                "statistics": "summary",
            },
            9,
        ),
    )
    def test_layer_contract(self, kwargs, num_trainable):
        if "shared_experts_gate" in kwargs:
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
            shared_experts_gate=True,
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
                "shared_experts_gate": True,
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
            with self.assertRaisesRegex(ValueError, "input_shape="):
                layer.build(shape)
        with self.assertRaisesRegex(ValueError, "expected axis -1"):
            make()(keras.Input((4, 6)))
        with self.assertRaisesRegex(ValueError, "width 5, returned 1"):
            make(shared_experts=keras.layers.Dense(1))(inputs())

    def test_float64(self):
        layer = MoE(num_experts=4, intermediate_dim=3, dtype="float64")
        self.assertEqual(layer.router.compute_dtype, "float64")
        if keras.config.backend() == "jax":
            return  # which has no float64 unless it is told to
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
        layer = MoE(router=RoundRobinRouter(3), experts=experts(3))
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
        load = history[f"{layer.statistics.prefix}_load_0"]
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

    def test_experts_must_keep_the_width(self):
        class Narrow(PlainExperts):
            def call(self, rows, group_sizes, training=None):
                return rows[:, :2]

        layer = MoE(router=RoundRobinRouter(3), experts=Narrow(3))
        with self.assertRaisesRegex(ValueError, "width 5, returned 2"):
            layer(inputs())
