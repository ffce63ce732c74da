"""What holds for every router with its own way of making logits."""

import keras
import numpy as np
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from tests import token_loop

TOKENS, DIM = 9, 5


def combine_matrix(routing, num_experts):
    """`(T, E)`: what each expert weighs."""
    experts = ops.arange(num_experts, dtype="int32")
    chosen = ops.equal(ops.expand_dims(routing.expert_indices, -1), experts)
    weights = ops.expand_dims(routing.expert_weights, -1)
    return ops.sum(ops.cast(chosen, weights.dtype) * weights, axis=1)


class RoutingMatrix(keras.layers.Layer):
    """A router as a layer of one output: logits, probs and weights."""

    def __init__(self, router):
        super().__init__(dtype=router.dtype_policy.name)
        self.router = router
        self.supports_masking = True

    def build(self, tokens_shape):
        if not self.router.built:
            self.router.build(tokens_shape)

    def call(self, tokens, mask=None, training=None, context=None):
        kwargs = {} if context is None else {"context": context}
        routing = self.router(tokens, mask=mask, training=training, **kwargs)
        finite = ops.isfinite(routing.logits)
        logits = ops.where(finite, routing.logits, 0.0)
        num_experts = self.router.num_experts
        return ops.concatenate(
            [logits, routing.probs, combine_matrix(routing, num_experts)],
            axis=-1,
        )


def as_arrays(layer, trainable=True):
    """The weights by the last part of their path, float64."""
    variables = layer.trainable_variables if trainable else layer.variables
    return {
        v.path.split("/")[-1]: ops.convert_to_numpy(v).astype("float64")
        for v in variables
    }


class LogitsChecks:
    """A mixin for test cases.

    They define `make(**kwargs)`, a router, `loop(token, context, weights)`, in
    NumPy and float64 `(logits, probs, {expert: weight})` of one token, and
    `context(num_tokens)`.
    """

    def context(self, num_tokens=TOKENS):
        return None

    def tokens(self, num_tokens=TOKENS):
        rng = np.random.default_rng(1)
        return rng.normal(size=(num_tokens, DIM)).astype("float32")

    def built(self, **kwargs):
        """A router with weights that are not small."""
        router = self.make(**kwargs)
        router.build((None, DIM))
        rng = np.random.default_rng(2)
        for v in router.trainable_variables:
            v.assign(rng.normal(size=v.shape))
        return router

    def kwargs(self, num_tokens=TOKENS):
        context = self.context(num_tokens)
        return {} if context is None else {"context": context}

    def run_loop(self, tokens, context, weights):
        rows = []
        for t, token in enumerate(tokens):
            logits, probs, chosen = self.loop(
                token, None if context is None else context[t], weights
            )
            combine = np.zeros(len(probs))
            for expert, weight in chosen.items():
                combine[expert] = weight
            rows.append(np.concatenate([logits, probs, combine]))
        return np.array(rows)

    def check_against_loop(self, **kwargs):
        layer = RoutingMatrix(self.built(**kwargs))
        layer.build((None, DIM))
        tokens, context = self.tokens(), self.context()
        width = 3 * layer.router.num_experts
        rng = np.random.default_rng(3)
        cotangent = rng.normal(size=(TOKENS, width)).astype("float32")
        outputs, d_tokens, d_weights = self.outputs_and_gradients(
            layer, tokens, cotangent, **self.kwargs()
        )
        arrays = {"tokens": tokens, **as_arrays(layer)}

        def objective(arrays):
            outputs = self.run_loop(arrays["tokens"], context, arrays)
            return np.sum(outputs * cotangent)

        expected = self.run_loop(tokens.astype("float64"), context, arrays)
        self.assert_relative(outputs, expected)
        # Best first.
        routing = layer.router(tokens, **self.kwargs())
        indices = ops.convert_to_numpy(routing.expert_indices)
        for t in range(TOKENS):
            chosen = list(
                self.loop(
                    tokens[t].astype("float64"),
                    None if context is None else context[t],
                    arrays,
                )[2]
            )
            self.assertAllEqual(indices[t], chosen)
        gradients = token_loop.gradients(objective, arrays)
        self.assert_relative(d_tokens, gradients.pop("tokens"), 1e-4)
        self.assertEqual(len(d_weights), len(gradients))
        for path, gradient in d_weights.items():
            expected = gradients[path.split("/")[-1]]
            self.assertGreater(np.abs(expected).max(), 1e-4)
            self.assert_relative(gradient, expected, 1e-4)

    def test_masked_tokens_change_nothing(self):
        tokens, kwargs = self.tokens(), self.kwargs()
        mask = np.arange(TOKENS) < 6
        poisoned = np.where(mask[:, None], tokens, np.nan).astype("float32")
        layer = RoutingMatrix(self.built())
        layer.build((None, DIM))
        cotangent = np.zeros((TOKENS, 3 * layer.router.num_experts))
        cotangent[:6] = np.random.default_rng(4).normal(
            size=cotangent[:6].shape
        )
        alone = self.outputs_and_gradients(
            layer, tokens[:6], cotangent[:6], **self.kwargs(6)
        )
        if "context" in kwargs:
            wrong = -7 if kwargs["context"].dtype == "int32" else np.nan
            kwargs["context"] = kwargs["context"].copy()
            kwargs["context"][6:] = wrong
        masked = self.outputs_and_gradients(
            layer,
            poisoned,
            cotangent,
            mask=ops.convert_to_tensor(mask),
            **kwargs,
        )
        for i in (0, 1):
            self.assert_relative(masked[i][:6], alone[i])
        self.assertTrue(np.all(masked[1][6:] == 0))
        for path, gradient in masked[2].items():
            self.assert_relative(gradient, alone[2][path])

    def test_half_precision(self):
        for policy in ("mixed_float16", "bfloat16"):
            self.check_dtypes(policy, "float16", "float32")

    def test_float64(self):
        if keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 unless told so as it starts.")
        self.check_dtypes("float64", "float64", "float64")

    def check_dtypes(self, policy, given, expected):
        router = self.make(dtype=policy)
        tokens = self.tokens().astype(given)
        for training in (False, True):
            routing = router(tokens, training=training, **self.kwargs())
            for field in ("logits", "probs", "expert_weights"):
                self.assertDType(getattr(routing, field), expected)
            self.assertDType(routing.expert_indices, "int32")
        for v in router.variables:
            if "seed" not in v.path:
                self.assertEqual(v.dtype, expected)

    def test_no_token_one_token_and_all_masked(self):
        layer = RoutingMatrix(self.built())
        layer.build((None, DIM))
        for num_tokens in (0, 1):
            results = self.outputs_and_gradients(
                layer,
                self.tokens(num_tokens),
                training=True,
                **self.kwargs(num_tokens),
            )
            self.assertEqual(results[0].shape[0], num_tokens)
            for value in (*results[:2], *results[2].values()):
                self.assertTrue(np.all(np.isfinite(value)))
        results = self.outputs_and_gradients(
            layer,
            np.full((TOKENS, DIM), np.nan, "float32"),
            np.zeros((TOKENS, 3 * layer.router.num_experts)),
            mask=ops.zeros((TOKENS,), "bool"),
            training=True,
            **self.kwargs(),
        )
        for value in results[1], *results[2].values():
            self.assertTrue(np.all(value == 0))

    def test_zero_tokens_have_finite_gradients(self):
        layer = RoutingMatrix(self.make())
        layer.build((None, DIM))
        _, d_tokens, d_weights = self.outputs_and_gradients(
            layer,
            np.zeros((TOKENS, DIM), "float32"),
            np.random.default_rng(4).normal(
                size=(TOKENS, 3 * layer.router.num_experts)
            ),
            **self.kwargs(),
        )
        for value in d_tokens, *d_weights.values():
            self.assertLess(np.abs(value).max(initial=0.0), 1e4)

    def test_config(self):
        router = self.make(name="gate")
        again = type(router).from_config(router.get_config())
        self.assertEqual(again.get_config(), router.get_config())
        for r in (router, again):
            r.build((None, DIM))
        again.set_weights(router.get_weights())
        self.assert_relative(
            again(self.tokens(), **self.kwargs()).expert_weights,
            ops.convert_to_numpy(
                router(self.tokens(), **self.kwargs()).expert_weights
            ),
            0,
        )

    def model(self):
        """A model of `(tokens, context)`, or of tokens alone."""
        router = self.make()
        inputs = {"x": keras.Input((3, DIM), name="x")}
        kwargs = {}
        if self.context() is not None:
            inputs["context"] = keras.Input(
                (3, *self.context().shape[1:]),
                dtype=str(self.context().dtype),
                name="context",
            )
            kwargs["context"] = inputs["context"]
        layer = MoE(
            router=router,
            experts=MLPExperts(router.num_experts, 8),
            statistics=None,
            name="moe",
        )
        x = inputs["x"]
        return keras.Model(inputs, x + layer(x, **kwargs))

    def test_fit_save_and_load(self):
        model = self.model()
        model.compile(
            keras.optimizers.Adam(0.01),
            "mse",
            jit_compile=keras.config.backend() != "torch",
        )
        rng = np.random.default_rng(4)
        data = {"x": rng.normal(size=(16, 3, DIM)).astype("float32")}
        if "context" in model.input:
            context = self.context(48)
            data["context"] = context.reshape(16, 3, *context.shape[1:])
        router = model.get_layer("moe").router
        before = as_arrays(router)
        target = np.sin(3 * data["x"])
        losses = model.fit(
            data, target, batch_size=8, epochs=4, verbose=0
        ).history["loss"]
        self.assertLess(losses[-1], losses[0])
        for name, array in as_arrays(router).items():
            self.assertGreater(np.abs(array - before[name]).max(), 1e-4, name)
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
        self.assertAllEqual(model(data), loaded(data))
