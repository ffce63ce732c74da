"""What `MoE` computes: against a token loop, masked, empty, shared."""

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
from keras_moe.ops.dispatch_plan import DROP_POLICIES
from keras_moe.routers import TopKRouter
from tests import token_loop
from tests.moe.sending import Sending
from tests.test_case import TestCase

# Three batches of four tokens, four experts.
SHAPE = (3, 4, 5)
MASK = np.arange(12).reshape(3, 4) % 4 != 2


def make(
    top_k=2,
    experts="glu",
    activation="silu",
    use_bias=False,
    layer_class=MoE,
    **kwargs,
):
    router = {
        k: kwargs.pop(k)
        for k in ("score_activation", "score_after_selection", "jitter")
        if k in kwargs
    }
    layer = layer_class(
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
        layers = [make(**kwargs), make(layer_class=Sending, **kwargs)]
        for a, b in zip(layers[0].weights, layers[1].weights, strict=True):
            b.assign(ops.convert_to_tensor(a))
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

        arrays = {"x": x.astype("float64"), **weights_of(layers[0])}
        wanted, kept, *_ = forward(arrays)
        if "capacity" in loop:
            self.assertLess(kept.sum(), 2 * kept.shape[0])  # something dropped
        gradients = token_loop.gradients(objective, arrays)

        d_x = gradients.pop("x")
        for layer in layers:
            # Without a capacity, gshard_test.py too sends rows in a graph.
            self.in_graph = layer is layers[0] or "capacity" in loop
            outputs, d_inputs, d_weights = self.outputs_and_gradients(
                layer,
                x,
                cotangent,
                losses=True,
                training=True,
                mask=None if mask is None else ops.array(mask),
            )
            self.assert_relative(outputs, wanted.reshape(SHAPE))
            self.assert_relative(d_inputs, d_x)
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
            for shape, per in (((0, 4, 5), "sequence"), ((3, 0, 5), "batch")):
                layer = make(capacity=Capacity(capacity_factor, per=per))
                out = layer(np.zeros(shape, "float32"), training=True)
                self.assertEqual(tuple(out.shape), shape)
                self.assert_losses(layer, [0.0, 0.0])

    @parameterized.parameters(*DROP_POLICIES)
    def test_empty_batches_of_any_rank(self, policy):
        for shape in ((0, 5), (2, 0, 5), (0, 2, 3, 5)):
            layer = make(capacity_factor=0.5, drop_policy=policy)
            out = layer(
                np.zeros(shape, "float32"),
                mask=np.ones(shape[:-1], "bool"),
                training=True,
            )
            self.assertEqual(tuple(out.shape), shape)

    def test_empty_batch_of_examples(self):
        layer = MoE(
            router=TopKRouter(2, 1),
            experts=LayerExperts(keras.layers.Dense(5), 2),
            route_per="example",
        )
        for shape in ((0, 4, 5), (2, 0, 3, 5)):
            out = layer(np.zeros(shape), mask=np.ones(shape[:-1], "bool"))
            self.assertEqual(tuple(out.shape), shape)

    def test_masks_of_another_shape_are_refused(self):
        for shape in ((2, 5), (1, 4), (3, 4, 1), (4,)):
            with self.assertRaisesRegex(ValueError, "`mask` must have"):
                make()(inputs(), mask=np.ones(shape, "bool"))

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
        layer = make(shared_experts=shared, shared_experts_mode="gate")
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
            {"capacity": Capacity(1.0, rule="flaxformer", per="sequence")},
            {"shared_experts_mode": "gate"},
        ):
            for shape in ((5,), (4, 5), (None, 5), (None, None, 5)):
                if "shared_experts_mode" in kwargs:
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
