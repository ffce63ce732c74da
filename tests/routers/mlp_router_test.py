import json
import pathlib

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.routers.mlp_router import MLPRouter
from tests import token_loop
from tests.routers.logits_checks import DIM
from tests.routers.logits_checks import TOKENS
from tests.routers.logits_checks import LogitsChecks
from tests.routers.logits_checks import RoutingMatrix
from tests.routers.logits_checks import combine_matrix
from tests.test_case import TestCase

BLOCKS = pathlib.Path(__file__).parents[1] / "data" / "blocks"


class MLPRouterTest(LogitsChecks, TestCase):
    """The router of MoE++, with all it can have."""

    def make(self, **kwargs):
        kwargs = {
            "hidden_dims": (3,),
            "activation": "tanh",
            "residual": "logits",
            "standardize_logits": 1.5,
            "zero_weight_experts": 1,
            "use_bias": True,
            "hidden_initializer": "normal",
            **kwargs,
        }
        return MLPRouter(4, **kwargs)

    def context(self, num_tokens=TOKENS):
        rng = np.random.default_rng(7)
        return rng.normal(size=(num_tokens, 4)).astype("float32")

    def loop(self, token, context, weights):
        x = token @ weights["hidden_kernel_0"] + weights["hidden_bias_0"]
        logits = np.tanh(x) @ weights["kernel"] + weights["bias"]
        logits = logits + context @ weights["context_kernel"]
        logits = 1.5 * logits / np.std(logits, ddof=1)
        probs = token_loop.softmax(logits)
        chosen = sorted(range(4), key=lambda e: -logits[e])[:2]
        counted = [e for e in chosen if e != 3]
        total = sum(probs[e] for e in counted)
        return (
            logits,
            probs,
            {e: probs[e] / total if e in counted else 0.0 for e in chosen},
        )

    def test_against_loop(self):
        self.check_against_loop()
        routing = self.built()(self.tokens(), **self.kwargs())
        indices = ops.convert_to_numpy(routing.expert_indices)
        weights = ops.convert_to_numpy(routing.expert_weights)
        # The zero expert is chosen, and the other one gets all.
        self.assertGreater(np.sum(indices == 3), 0)
        self.assertAllClose(weights.sum(axis=1), np.ones(TOKENS))
        self.assertAllEqual(weights == 0, indices == 3)

    def test_no_choice_counts(self):
        for top_k, zeros in ((1, 1), (2, 3)):
            router = self.built(
                top_k=top_k,
                zero_weight_experts=zeros,
                residual=None,
                normalize_epsilon=0.0,
                learned_scale="expert",
            )
            # All tokens choose the last experts.
            router.bias.assign(200.0 * np.arange(4))
            layer = self.matrix(router)
            outputs, d_tokens, d_weights = self.outputs_and_gradients(
                layer, self.tokens()
            )
            self.assertAllEqual(outputs[:, 8:], np.zeros((TOKENS, 4)))
            for value in d_tokens, *d_weights.values():
                self.assertTrue(np.all(np.isfinite(value)))

    def matrix(self, router):
        layer = RoutingMatrix(router)
        layer.build((None, DIM))
        return layer

    def test_without_a_context(self):
        router = self.built()
        zeros = np.zeros((TOKENS, 4), "float32")
        self.assert_relative(
            router(self.tokens()).logits,
            ops.convert_to_numpy(router(self.tokens(), context=zeros).logits),
        )
        layer = self.matrix(router)
        _, _, d_weights = self.outputs_and_gradients(layer, self.tokens())
        (name,) = (name for name in d_weights if "context_kernel" in name)
        self.assertAllEqual(d_weights[name], np.zeros((4, 4)))

    def test_state(self):
        router = self.built(standardize_logits=None, temperature=2.0)
        routing = router(self.tokens(), **self.kwargs())
        # Not divided by the temperature.
        state = ops.convert_to_numpy(routing.state)
        self.assert_relative(routing.logits, state / 2)
        state = router.state(self.tokens(), self.context())
        self.assert_relative(state, ops.convert_to_numpy(routing.state))

    def test_linear_and_equal_logits(self):
        router = MLPRouter(
            4, hidden_dims=(), standardize_logits=1.0, normalize_inputs=True
        )
        router.build((None, DIM))
        self.assertLen(router.trainable_variables, 2)
        router.kernel.assign(np.ones((DIM, 4)))
        tokens = self.tokens().astype("float64")
        scale = np.sqrt(np.mean(tokens**2, axis=1, keepdims=True) + 1e-6)
        expected = np.sum(tokens / scale, axis=1, keepdims=True)
        logits = ops.convert_to_numpy(router(self.tokens()).logits)
        self.assert_relative(logits, np.tile(expected, (1, 4)))

    def test_hidden_layers_start_differently(self):
        router = MLPRouter(4, hidden_dims=(DIM, DIM))
        router.build((None, DIM))
        difference = router.hidden_kernel_0 - router.hidden_kernel_1
        self.assertGreater(ops.convert_to_numpy(ops.std(difference)), 0.1)

    def test_jitter(self):
        router = self.make(jitter=0.1)
        first, second = (
            ops.convert_to_numpy(
                router(self.tokens(), training=True, **self.kwargs()).state
            )
            for _ in range(2)
        )
        self.assertGreater(np.abs(first - second).max(), 1e-5)
        state = router.state(self.tokens(), self.context())
        self.assertAllEqual(state, router(self.tokens(), **self.kwargs()).state)

    def test_from_layer_to_layer(self):
        model = keras.Sequential([TwoLayers()])
        model.compile(
            keras.optimizers.Adam(0.01),
            "mse",
            jit_compile=keras.config.backend() == "jax",
        )
        x = np.random.default_rng(5).normal(size=(8, 3, DIM)).astype("float32")
        losses = model.fit(x, np.sin(x), epochs=4, verbose=0).history["loss"]
        self.assertLess(losses[-1], losses[0])
        first, second = (moe.router for moe in model.layers[0].moes)
        trained = ops.convert_to_numpy(second.context_kernel)
        self.assertGreater(np.abs(trained).max(), 1e-3)
        self.assertAllEqual(first.context_kernel, np.zeros((4, 4)))

    @parameterized.parameters(
        ({"hidden_dims": (0,)}, r"hidden_dims=\(0,\)"),
        ({"hidden_dims": -1}, "hidden_dims=-1"),
        ({"projection_dim": 0}, "projection_dim=0"),
        ({"residual": "state"}, "residual='state'"),
        ({"residual": "projection"}, "projection_dim=None"),
        ({"normalize_projection": True}, "normalize_projection=True"),
        ({"normalize_projection_epsilon": -1.0}, "epsilon=-1.0"),
        ({"standardize_logits": 0.0}, "standardize_logits=0.0"),
        ({"zero_weight_experts": 4}, "zero_weight_experts=4, num_experts=4"),
        ({"zero_weight_experts": -1}, "zero_weight_experts=-1"),
        ({"score_after_selection": True}, "score_after_selection=True"),
        ({"num_always_on": 1}, "num_always_on=1"),
    )
    def test_errors(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, message):
            self.make(**kwargs)

    def test_errors_of_the_context(self):
        with self.assertRaisesRegex(ValueError, r"shape=\(9, 3\)"):
            self.make()(self.tokens(), context=np.zeros((9, 3)))
        with self.assertRaisesRegex(ValueError, "residual=None"):
            self.make(residual=None)(self.tokens(), **self.kwargs())


class TwoLayers(keras.layers.Layer):
    """Two MoE layers; the first hands its state on to the second."""

    def __init__(self):
        super().__init__()
        self.moes = [
            MoE(
                router=MLPRouter(4, hidden_dims=(3,), residual="logits"),
                experts=MLPExperts(4, 8),
                return_routing=True,
                statistics=None,
            )
            for _ in range(2)
        ]

    def build(self, input_shape):
        for moe in self.moes:
            moe.build(input_shape)

    def call(self, x, training=None):
        context = None
        for moe in self.moes:
            y, routing = moe(x, context=context, training=training)
            context = ops.reshape(routing.state, (-1, *x.shape[1:-1], 4))
            x = x + y
        return x


class ZayaRouterTest(TestCase):
    @parameterized.parameters("zaya", "zaya__eda")
    def test_recorded(self, case):
        spec = json.loads((BLOCKS / f"{case}.json").read_text())["spec"]
        with np.load(BLOCKS / f"{case}.npz") as archive:
            arrays = dict(archive)
        w = {k.removeprefix("w/gate."): v for k, v in arrays.items()}
        num_classes = len(w["balancing_biases"])
        hidden = w["router_mlp.fc1.weight"], w["router_mlp.fc2.weight"]
        router = MLPRouter(
            num_classes,
            top_k=spec["router"]["k"],
            projection_dim=len(w["down_proj.weight"]),
            hidden_dims=[len(kernel) for kernel in hidden],
            normalize_projection=True,
            normalize_projection_epsilon=spec["router"]["rms_eps"],
            residual="projection",
            expert_bias=True,
            zero_weight_experts=1,
            normalize_weights=False,
        )
        x = arrays["x"].reshape(-1, arrays["x"].shape[-1])
        router.build(x.shape)
        for variable, value in (
            (router.projection_kernel, w["down_proj.weight"].T),
            (router.projection_bias, w["down_proj.bias"]),
            (router.context_scale, w["router_states_scale"]),
            (router.projection_scale, w["router_mlp.norm.weight"]),
            (router.hidden_kernel_0, hidden[0].T),
            (router.hidden_bias_0, w["router_mlp.fc1.bias"]),
            (router.hidden_kernel_1, hidden[1].T),
            (router.hidden_bias_1, w["router_mlp.fc2.bias"]),
            (router.kernel, w["router_mlp.out_proj.weight"].T),
            (router.expert_bias, w["balancing_biases"]),
        ):
            variable.assign(value)
        context = arrays.get("prev_router_states")
        if context is not None:
            context = context.reshape(len(x), -1)
        routing = router(x, context=context)
        self.assert_relative(routing.logits, arrays["router_logits"])
        state = arrays["next_router_states"].reshape(len(x), -1)
        self.assert_relative(routing.state, state)
        self.assert_relative(router.state(x, context), state)
        combine = combine_matrix(routing, num_classes)[:, :-1]
        self.assert_relative(combine, arrays["combine"])
