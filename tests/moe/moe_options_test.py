"""Options of `MoE` beyond its first form, each against a loop of its own."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

import keras_moe
from keras_moe.experts import GLUExperts
from keras_moe.experts import MLPExperts
from keras_moe.layers import Capacity
from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter
from tests import token_loop
from tests.moe.moe_test import SHAPE
from tests.moe.moe_test import inputs
from tests.moe.moe_test import make
from tests.moe.moe_test import weights_of
from tests.test_case import TestCase


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


class CausalTest(TestCase):
    def test_looking_ahead_is_refused(self):
        make(causal=True)
        # Without a limit no token competes; in this order none waits for
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

    def test_kept_weights_of_training(self):
        capacity = Capacity(normalize_kept_weights=True)
        experts = GLUExperts(4, 3)
        with self.assertRaisesRegex(ValueError, "no gradient"):
            MoE(
                router=TopKRouter(4, 1, eval_top_k=2),
                experts=experts,
                capacity=capacity,
            )
        MoE(
            router=TopKRouter(4, 2, eval_top_k=1),
            experts=experts,
            capacity=capacity,
        )
