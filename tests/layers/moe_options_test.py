"""Options of `MoE` beyond its first form, each against a loop of its own."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

import keras_moe
from keras_moe.experts import GLUExperts
from keras_moe.experts import LayerExperts
from keras_moe.experts import MLPExperts
from keras_moe.layers import Capacity
from keras_moe.layers import MoE
from keras_moe.routers import ExpertChoiceRouter
from keras_moe.routers import HashRouter
from keras_moe.routers import MLPRouter
from keras_moe.routers import TopKRouter
from tests import token_loop
from tests.layers.moe_test import inputs
from tests.layers.moe_test import make
from tests.layers.moe_test import weights_of
from tests.test_case import TestCase

SHAPE = (3, 4, 5)


def loop_parts(layer, x):
    """`(tokens, indices, weights, expert)` as NumPy float64."""
    weights = weights_of(layer)
    tokens = x.reshape(-1, x.shape[-1]).astype("float64")
    _, _, indices, expert_weights = token_loop.route(tokens, weights, 2)

    def expert(row, e):
        return token_loop.expert(row, weights, e, "silu")

    return tokens, indices, expert_weights, expert


class WhereWeightsApplyTest(TestCase):
    def test_input(self):
        layer = make(weights_on="input")
        x = inputs()
        tokens, indices, weights, expert = loop_parts(layer, x)
        wanted = np.zeros(tokens.shape)
        for t, k in np.ndindex(*indices.shape):
            wanted[t] += expert(weights[t, k] * tokens[t], indices[t, k])
        self.assert_relative(layer(x), wanted.reshape(SHAPE))

    def test_input_with_masked_and_dropped_tokens(self):
        layer = make(weights_on="input", capacity_factor=0.6)
        x, mask = inputs(), np.arange(12).reshape(3, 4) % 4 != 2
        tokens, indices, weights, expert = loop_parts(layer, x)
        kept = token_loop.keep(
            indices, weights, 4, mask.reshape(-1), 4, "position"
        )
        wanted = np.zeros(tokens.shape)
        for t, k in np.argwhere(kept):
            wanted[t] += expert(weights[t, k] * tokens[t], indices[t, k])
        outputs = layer(x, mask=ops.array(mask))
        self.assert_relative(outputs, wanted.reshape(SHAPE))

    def test_gradient_reaches_the_router(self):
        layer = make(weights_on="input", losses=None)
        _, _, d_weights = self.outputs_and_gradients(layer, inputs())
        kernel = d_weights["router/kernel"]

        def objective(arrays):
            x = inputs().reshape(-1, 5).astype("float64")
            _, _, indices, w = token_loop.route(x, arrays, 2)
            return sum(
                token_loop.expert(w[t, k] * x[t], arrays, e, "silu").sum()
                for (t, k), e in np.ndenumerate(indices)
            )

        arrays = weights_of(layer)
        fixed = {k: v for k, v in arrays.items() if k != "router/kernel"}
        wanted = token_loop.gradients(
            lambda a: objective({**fixed, **a}),
            {"router/kernel": arrays["router/kernel"]},
        )
        self.assert_relative(kernel, wanted["router/kernel"], 1e-4)


class KeptWeightsTest(TestCase):
    @parameterized.parameters("position", "priority", "token")
    def test_survivors_share_the_whole(self, policy):
        layer = make(
            capacity=Capacity(
                0.6, drop_policy=policy, per=1, normalize_kept_weights=True
            )
        )
        x = inputs()
        tokens, indices, weights, expert = loop_parts(layer, x)
        probs = token_loop.route(tokens, weights_of(layer), 2)[1]
        kept = token_loop.keep(
            indices,
            weights,
            4,
            np.ones(12, bool),
            2,  # ceil(4 tokens * 2 * 0.6 / 4) in each of the 3 sequences
            policy,
            groups=3,
            priority=probs.max(axis=1),
        )
        self.assertFalse(kept.all())
        wanted = np.zeros(tokens.shape)
        for t, k in np.argwhere(kept):
            share = weights[t, k] / weights[t, kept[t]].sum()
            wanted[t] += share * expert(tokens[t], indices[t, k])
        self.assert_relative(layer(x), wanted.reshape(SHAPE))

    def test_random_is_for_training_and_seeded(self):
        def outputs(seed, training):
            layer = make(
                capacity=Capacity(0.5, drop_policy="random", seed=seed)
            )
            return ops.convert_to_numpy(layer(inputs(), training=training))

        self.assertAllClose(outputs(1, True), outputs(1, True))
        self.assertNotAllClose(outputs(1, True), outputs(2, True))
        by_position = make(capacity_factor=0.5)(inputs())
        self.assertAllClose(outputs(1, False), by_position, atol=1e-6)


class SharedExpertsTest(TestCase):
    @parameterized.parameters("average", "residual")
    def test_modes(self, mode):
        shared = MLPExperts(1, 3, activation="tanh", name="shared")
        layer = make(shared_experts=shared, shared_experts_mode=mode)
        x = inputs()
        tokens, indices, weights, expert = loop_parts(layer, x)
        wanted = np.zeros(tokens.shape)
        all_weights = weights_of(layer)
        for t, token in enumerate(tokens):
            routed = sum(
                w * expert(token, e)
                for w, e in zip(weights[t], indices[t], strict=True)
            )
            other = token_loop.expert(
                token, all_weights, 0, "tanh", prefix="shared"
            )
            share = np.array([0.5, 0.5])
            if mode == "residual":
                share = token @ all_weights["shared_gate_kernel"]
                share = token_loop.softmax(share)
            wanted[t] = share[0] * routed + share[1] * other
        self.assert_relative(layer(x), wanted.reshape(SHAPE))


class AroundTheExpertsTest(TestCase):
    def test_latent_experts(self):
        down = keras.layers.Dense(2, use_bias=False, name="down")
        up = keras.layers.Dense(5, name="up")
        layer = make(pre_experts=down, post_experts=up)
        self.assertEqual(layer.experts.gate_kernel.shape, (4, 2, 3))
        x = inputs()
        tokens, indices, weights, expert = loop_parts(layer, x)
        kernels = [
            ops.convert_to_numpy(w) for w in (*down.weights, *up.weights)
        ]
        wanted = np.zeros(tokens.shape)
        for t, token in enumerate(tokens):
            latent = sum(
                w * expert(token @ kernels[0], e)
                for w, e in zip(weights[t], indices[t], strict=True)
            )
            wanted[t] = latent @ kernels[1] + kernels[2]
        self.assert_relative(layer(x), wanted.reshape(SHAPE))
        # A bias behind the experts does not reach masked tokens.
        up.bias.assign(np.ones(5))
        mask = np.arange(12).reshape(3, 4) % 3 > 0
        outputs = ops.convert_to_numpy(layer(x, mask=ops.array(mask)))
        self.assertAllEqual(outputs[~mask], np.zeros((4, 5)))

    def test_experts_of_another_width(self):
        experts = GLUExperts(4, 3, output_dim=7)
        layer = MoE(router=TopKRouter(4), experts=experts)
        inputs_ = keras.Input((None, 5))
        model = keras.Model(inputs_, layer(inputs_))
        self.assertEqual(model.output_shape, (None, None, 7))
        self.assertEqual(tuple(model(inputs()).shape), (3, 4, 7))

    def test_masked_tokens_do_not_count_in_normalizations(self):
        x, mask = inputs(), np.arange(12).reshape(3, 4) % 4 < 3
        for side in ("pre_experts", "post_experts"):
            norms = [keras.layers.BatchNormalization() for _ in range(2)]
            padded, short = (make(**{side: norm}) for norm in norms)
            outputs = padded(x, mask=ops.array(mask), training=True)
            wanted = short(x[:, :3], training=True)
            self.assertAllClose(outputs[:, :3], wanted, atol=1e-5)


class SideInputsTest(TestCase):
    def test_modalities_for_a_loss(self):
        loss = keras_moe.losses.EntropyLoss(1.0, modality=1)
        layer = make(losses=loss)
        x, modality = inputs(), np.arange(12).reshape(3, 4) % 2
        layer(x, context=modality, training=True)
        routing = layer.route(x, context=modality)
        probs = ops.convert_to_numpy(routing.probs)[modality.reshape(-1) == 1]
        wanted = -(probs * np.log(probs)).sum(axis=1).mean()
        self.assert_relative(layer.losses[0], wanted)

    def layer(self):
        table = [[0, 1], [2, 3], [3, 0]]
        return MoE(
            router=HashRouter(4, table=table),
            experts=GLUExperts(4, 3, name="experts"),
        )

    def test_token_ids(self):
        layer = self.layer()
        ids = np.arange(12).reshape(3, 4) % 3
        x = inputs()
        outputs = layer(x, context=ids)
        tokens, weights = x.reshape(-1, 5), weights_of(layer)
        wanted = np.zeros(tokens.shape)
        for t, i in enumerate(ids.reshape(-1)):
            for e in layer.router.get_config()["table"][i]:
                row = tokens[t].astype("float64")
                wanted[t] += token_loop.expert(row, weights, e, "silu") / 2
        self.assert_relative(outputs, wanted.reshape(SHAPE))
        # One id for each example.
        by_example = layer(x, context=np.array([2, 0, 1]))
        spread = layer(x, context=np.repeat([[2], [0], [1]], 4, axis=1))
        self.assertAllClose(by_example, spread)

    def test_functional_model(self):
        x, ids = keras.Input((4, 5)), keras.Input((4,), dtype="int32")
        model = keras.Model([x, ids], self.layer()(x, context=ids))
        model.compile("sgd", "mse")
        id_values = np.arange(12).reshape(3, 4) % 3
        history = model.fit(
            [inputs(), id_values], inputs(1), epochs=2, verbose=0
        )
        self.assertLess(history.history["loss"][1], history.history["loss"][0])

    def test_errors(self):
        with self.assertRaisesRegex(ValueError, "context"):
            self.layer()(inputs())
        with self.assertRaisesRegex(ValueError, "Received a context"):
            make()(inputs(), context=np.zeros((3, 4), "int32"))
        for context in (
            np.zeros((3, 4, 5), "int32"),
            np.zeros((3, 4, 5, 6), "float32"),
            np.zeros((3,), "float32"),
        ):
            with self.assertRaisesRegex(ValueError, r"context.shape=\(3"):
                self.layer()(inputs(), context=context)

    def test_a_routing_handed_on(self):
        def router():
            return MLPRouter(
                4, hidden_dims=(6,), residual="logits", name="router"
            )

        x = keras.Input((4, 5))
        first = MoE(
            router=router(), experts=GLUExperts(4, 3), return_routing=True
        )
        y, routing = first(x)
        state = ops.reshape(routing.state, (-1, 4, 4))
        second = MoE(router=router(), experts=GLUExperts(4, 3))
        z = second(y, context=state)
        second.router.context_kernel.assign(np.eye(4))
        model = keras.Model(x, [y, z])
        y_value, z_value = model(inputs())
        wanted_y, routing = first(inputs())
        self.assertAllClose(y_value, wanted_y, atol=1e-6)
        state = ops.reshape(routing.state, (3, 4, 4))
        self.assertAllClose(z_value, second(wanted_y, context=state), atol=1e-6)
        self.assertNotAllClose(z_value, second(wanted_y), atol=1e-6)

    def test_a_routing_of_unknown_size(self):
        for router in (
            ExpertChoiceRouter(4, per="sequence"),
            ExpertChoiceRouter(4, per=3),
            MLPRouter(4, hidden_dims=(3,), residual="logits"),
        ):
            layer = MoE(
                router=router,
                experts=GLUExperts(4, 3),
                return_routing=True,
                dtype="mixed_float16",
            )
            outputs, routing = layer(keras.Input((6, 5)))
            self.assertEqual(outputs.shape, (None, 6, 5))
            self.assertEqual(routing.probs.shape, (None, 4))
            self.assertEqual(routing.probs.dtype, "float32")

    def test_large_ids(self):
        layer = MoE(router=HashRouter(4, num_ids=10), experts=GLUExperts(4, 3))
        if keras.config.backend() == "jax":
            self.skipTest("JAX has no int64 unless it is told to")
        ids = np.array([2**32 + 1, 7, 2**33], "int64")
        layer.build((None, 5))
        table = ops.convert_to_numpy(layer.router.table)
        indices = layer.route(inputs()[:, 0], context=ids).expert_indices
        self.assertAllEqual(indices, table[ids % 10])


class RoutePerExampleTest(TestCase):
    def layer(self, **kwargs):
        return MoE(
            router=TopKRouter(
                3,
                2,
                name="router",
                kernel_initializer=keras.initializers.RandomNormal(1.0, seed=1),
            ),
            experts=LayerExperts(
                keras.layers.Conv1D(6, 2, padding="same", activation="tanh"), 3
            ),
            route_per="example",
            **kwargs,
        )

    def test_convolutions(self):
        layer = self.layer()
        x = np.random.default_rng(0).normal(size=(6, 4, 5)).astype("float32")
        outputs = layer(x)
        kernel = ops.convert_to_numpy(layer.router.kernel)
        wanted = np.zeros((6, 4, 6))
        for b in range(6):
            logits = x[b].mean(axis=0) @ kernel
            chosen = np.argsort(-logits, kind="stable")[:2]
            weights = token_loop.softmax(logits[chosen])
            for w, e in zip(weights, chosen, strict=True):
                expert = layer.experts.layers[e]
                wanted[b] += w * ops.convert_to_numpy(expert(x[b : b + 1]))[0]
        self.assert_relative(outputs, wanted)
        self.assertEqual(layer.compute_output_shape(x.shape), (6, 4, 6))

    def test_recurrent_experts_change_the_rank(self):
        layer = MoE(
            router=TopKRouter(2, top_k=1),
            experts=LayerExperts(keras.layers.SimpleRNN(3), 2),
            route_per="example",
        )
        x = keras.Input((4, 5))
        model = keras.Model(x, layer(x))
        self.assertEqual(model.output_shape, (None, 3))
        model.compile("adam", "mse")
        history = model.fit(
            np.ones((8, 4, 5)), np.ones((8, 3)), epochs=3, verbose=0
        )
        self.assertTrue(np.isfinite(history.history["loss"]).all())

    def test_masked_positions_do_not_route(self):
        layer = self.layer()
        rng = np.random.default_rng(0)
        x = rng.normal(size=(6, 4, 5)).astype("float32")
        mask = np.arange(4) < np.array([[4], [3], [2], [1], [0], [4]])
        other = np.where(mask[..., None], x, np.nan)
        self.assertAllClose(
            layer(x, mask=ops.array(mask)), layer(other, mask=ops.array(mask))
        )
        routing = layer.route(x, mask=ops.array(mask))
        kernel = ops.convert_to_numpy(layer.router.kernel)
        means = np.stack([x[b, mask[b]].mean(axis=0) for b in range(4)])
        self.assert_relative(routing.logits[:4], means @ kernel)
        # An example without any position gives zero.
        outputs = ops.convert_to_numpy(layer(x, mask=ops.array(mask)))
        self.assertAllEqual(outputs[4], np.zeros((4, 6)))

    def test_long_examples_in_half_precision(self):
        layer = self.layer(dtype="mixed_float16")
        x = np.full((2, 1000, 5), 100.0)
        masked = layer.route(x, mask=np.ones((2, 1000), bool))
        self.assertAllClose(masked.logits, layer.route(x).logits, rtol=1e-2)

    def test_shared_experts_over_time(self):
        layer = self.layer(
            shared_experts=keras.layers.SimpleRNN(6, return_sequences=True)
        )
        x = np.ones((2, 4, 5), "float32")
        outputs = layer(x, mask=np.ones((2, 4), bool))
        self.assertAllClose(outputs, layer(x), atol=1e-6)

    def test_needs_positions(self):
        with self.assertRaisesRegex(ValueError, "rank 3 or more"):
            self.layer()(np.ones((3, 5)))


class ExpertChoiceTest(TestCase):
    """Experts choose: few rows, and another way back to the tokens."""

    def layer(self, **kwargs):
        return MoE(
            router=ExpertChoiceRouter(
                4,
                capacity_factor=1.0,
                name="router",
                kernel_initializer=keras.initializers.RandomNormal(1.0, seed=1),
            ),
            experts=GLUExperts(
                4,
                3,
                name="experts",
                kernel_initializer=keras.initializers.GlorotUniform(seed=2),
            ),
            losses=None,
            **kwargs,
        )

    def forward(self, arrays):
        tokens = arrays["x"].reshape(-1, SHAPE[-1])
        logits = tokens @ arrays["router/kernel"]
        probs = np.stack([token_loop.softmax(row) for row in logits])
        outputs = np.zeros(tokens.shape)
        for e in range(4):  # each takes its 3 best of the 12
            for t in np.argsort(-probs[:, e], kind="stable")[:3]:
                row = token_loop.expert(tokens[t], arrays, e, "silu")
                outputs[t] += probs[t, e] * row
        return outputs

    def test_outputs_and_gradients(self):
        layer = self.layer()
        layer.build(SHAPE)
        x, cotangent = inputs(0), inputs(1)
        outputs, d_inputs, d_weights = self.outputs_and_gradients(
            layer, x, cotangent
        )
        arrays = {"x": x.astype("float64"), **weights_of(layer)}
        self.assert_relative(outputs, self.forward(arrays).reshape(SHAPE))
        wanted = token_loop.gradients(
            lambda a: np.sum(self.forward(a) * cotangent.reshape(-1, 5)),
            arrays,
        )
        self.assert_relative(d_inputs, wanted.pop("x"), 1e-4)
        for path, gradient in wanted.items():
            self.assert_relative(d_weights[path], gradient, 1e-4)

    def test_rows_are_as_many_as_the_experts_take(self):
        seen = []

        class Counting(GLUExperts):
            def call(self, rows, group_sizes, training=None):
                seen.append(tuple(rows.shape))
                return super().call(rows, group_sizes, training=training)

        layer = MoE(router=ExpertChoiceRouter(4), experts=Counting(4, 3))
        layer(inputs())
        self.assertEqual(seen[-1], (24, 5))  # not 12 tokens times 4 experts


class CausalTest(TestCase):
    def test_looking_ahead_is_refused(self):
        make(causal=True)
        # Without a limit nobody competes; in this order nobody waits for
        # later tokens.
        make(causal=True, drop_policy="weight")
        make(causal=True, capacity_factor=1.0, drop_policy="token")
        make(causal=True, capacity_factor=1.0, top_k=1)
        for policy in ("position", "weight", "priority", "random"):
            with self.assertRaisesRegex(ValueError, f"drop_policy='{policy}'"):
                make(causal=True, capacity_factor=1.0, drop_policy=policy)
        for name in ("ExpertChoiceRouter", "SinkhornRouter", "BASERouter"):
            router = getattr(keras_moe.routers, name)
            with self.assertRaisesRegex(ValueError, "allow_lookahead=True"):
                MoE(router=router(4), experts=GLUExperts(4, 3), causal=True)
            told = router(4, allow_lookahead=True)
            MoE(router=told, experts=GLUExperts(4, 3), causal=True)
        with self.assertRaisesRegex(ValueError, "route_per='example'"):
            make(causal=True, route_per="example")

    @parameterized.parameters("token", "position")
    def test_earlier_tokens_first_is_causal(self, policy):
        # With one expert a token both are; with two, second choices of early
        # tokens come behind first ones of later tokens, unless by token.
        top_k = 2 if policy == "token" else 1
        capacity = Capacity(size=1, drop_policy=policy)
        layer = make(top_k=top_k, capacity=capacity, causal=True)
        x = inputs(shape=(1, 8, 5))
        whole = ops.convert_to_numpy(layer(x))
        for length in (1, 3, 6):
            self.assertAllClose(
                layer(x[:, :length]), whole[:, :length], atol=1e-6
            )


class OptionsConfigTest(TestCase):
    def test_save_and_load(self):
        layer = MoE(
            router=TopKRouter(
                4, 2, expert_bias=True, learned_scale="expert", seed=1
            ),
            experts=GLUExperts(4, 3),
            shared_experts=MLPExperts(1, 3),
            shared_experts_mode="residual",
            capacity=Capacity(1.0, drop_policy="priority", per="sequence"),
            weights_on="input",
            pre_experts=keras.layers.Dense(3, use_bias=False),
            post_experts=keras.layers.Dense(5),
            losses=[keras_moe.losses.LoadBalancingLoss(0.5, per="sequence")],
        )
        x = keras.Input((4, 5))
        model = keras.Model(x, layer(x))
        model.compile("adam", "mse")
        model.fit(inputs(), inputs(1), epochs=2, verbose=0)
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        again = keras.saving.load_model(path)
        self.assertAllClose(again(inputs()), model(inputs()), atol=1e-6)
        config = again.layers[-1].get_config()
        self.assertEqual(config["weights_on"], "input")
        self.assertAllClose(
            again.layers[-1].router.expert_bias, layer.router.expert_bias
        )
        self.assertGreater(
            np.abs(ops.convert_to_numpy(layer.router.expert_bias)).max(), 0
        )

    @parameterized.parameters(
        ({"weights_on": "both"}, "weights_on='both'"),
        ({"route_per": "batch"}, "route_per='batch'"),
        ({"pre_experts": 3}, "pre_experts=3"),
        ({"post_experts": "dense"}, "post_experts='dense'"),
        ({"shared_experts_mode": "sum"}, "shared_experts_mode='sum'"),
        ({"shared_experts_mode": "gate"}, "needs `shared_experts`"),
        ({"capacity": 1.25}, "capacity=1.25"),
        (
            {"capacity": Capacity(normalize_kept_weights=True), "top_k": 1},
            "no gradient",
        ),
        (
            {"capacity": Capacity(1.0), "capacity_factor": 1.0},
            "`capacity` stands in the place of `capacity_factor`",
        ),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            make(**kwargs)
