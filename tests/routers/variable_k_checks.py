"""What holds for every router whose number of experts varies per token."""

import keras
import numpy as np
from keras import ops

from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.ops.routing import expert_counts
from tests import token_loop
from tests.routers.dense_weights import DenseWeights


def as_arrays(layer):
    """The weights by the last part of their path, float64."""
    return {
        v.path.split("/")[-1]: ops.convert_to_numpy(v).astype("float64")
        for v in layer.trainable_variables
    }


class LoopChecks:
    """A mixin for test cases: the router does what a loop over tokens does.

    They define `make(num_experts, **kwargs)`, a router, and
    `loop(tokens, weights)`, in NumPy and float64 what each of five experts
    weighs, `(T, 5)`.
    """

    def tokens(self, num_tokens=12, dim=6):
        rng = np.random.default_rng(1)
        return rng.normal(size=(num_tokens, dim)).astype("float32")

    def cotangent(self):
        rng = np.random.default_rng(2)
        return rng.normal(size=(12, 5)).astype("float32")

    def test_weights_and_gradients_against_a_loop(self):
        layer = DenseWeights(self.make(5))
        layer.build((None, 6))
        tokens, cotangent = self.tokens(), self.cotangent()
        outputs, d_tokens, d_weights = self.outputs_and_gradients(
            layer, tokens, cotangent
        )
        arrays = {"tokens": tokens, **as_arrays(layer)}

        def objective(arrays):
            weights = {k: v for k, v in arrays.items() if k != "tokens"}
            return np.sum(self.loop(arrays["tokens"], weights) * cotangent)

        expected = self.loop(
            tokens.astype("float64"), {k: v for k, v in arrays.items()}
        )
        self.assert_relative(outputs, expected)
        gradients = token_loop.gradients(objective, arrays)
        self.assert_relative(d_tokens, gradients.pop("tokens"), 1e-4)
        self.assertEqual(len(d_weights), len(gradients))
        for path, gradient in d_weights.items():
            expected = gradients[path.split("/")[-1]]
            self.assertGreater(np.abs(expected).max(), 1e-3)
            self.assert_relative(gradient, expected, 1e-4)

    def test_choices(self):
        router = self.make(5)
        routing = router(self.tokens())
        indices = ops.convert_to_numpy(routing.expert_indices)
        weights = ops.convert_to_numpy(routing.expert_weights)
        loop = self.loop(self.tokens().astype("float64"), as_arrays(router))
        self.assertEqual(
            keras.backend.standardize_dtype(routing.expert_indices.dtype),
            "int32",
        )
        self.assertTrue(np.all(weights >= 0))
        self.assertAllEqual(indices < 5, weights > 0)
        for t in range(12):
            chosen = [e for e in indices[t] if e < 5]
            self.assertEqual(len(set(chosen)), len(chosen))
            self.assertAllEqual(sorted(chosen), np.flatnonzero(loop[t]))
            self.check_order(indices[t], loop[t])
        self.assertAllEqual(
            expert_counts(routing, 5), np.count_nonzero(loop, axis=0)
        )

    def check_order(self, indices, weights):
        best_first = sorted(range(5), key=lambda e: -weights[e])
        chosen = [e for e in best_first if weights[e] > 0][: len(indices)]
        missing = [5] * (len(indices) - len(chosen))
        self.assertAllEqual(indices, chosen + missing)


class VariableKChecks(LoopChecks):
    """The same, and everything else that a router must stand."""

    def test_moe_computes_what_the_weights_say(self):
        layer = MoE(
            router=self.make(5),
            experts=MLPExperts(
                5, 4, activation="tanh", kernel_initializer="normal"
            ),
            losses=None,
        )
        tokens = self.tokens()
        outputs = layer(tokens)
        arrays = as_arrays(layer.router)
        combine = self.loop(tokens.astype("float64"), arrays)
        weights = {
            f"experts/{k}": v for k, v in as_arrays(layer.experts).items()
        }
        expected = np.zeros(tokens.shape)
        for t, e in np.argwhere(combine):
            expected[t] += combine[t, e] * token_loop.expert(
                tokens[t], weights, e, "tanh"
            )
        self.assertGreater(np.abs(expected).max(), 1e-4)
        self.assert_relative(
            ops.convert_to_numpy(outputs) / expected.std(),
            expected / expected.std(),
        )

    def test_float32_in_every_policy(self):
        for policy in ("mixed_float16", "bfloat16"):
            router = self.make(5, dtype=policy)
            routing = router(ops.cast(self.tokens(), "float16"))
            for field in ("logits", "probs", "expert_weights"):
                dtype = getattr(routing, field).dtype
                self.assertEqual(
                    keras.backend.standardize_dtype(dtype), "float32"
                )
            for variable in router.variables:
                self.assertNotIn(variable.dtype, ("float16", "bfloat16"))

    def test_float64(self):
        if keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 unless told so as it starts.")
        routing = self.make(5, dtype="float64")(self.tokens().astype("float64"))
        self.assertDType(routing.expert_weights, "float64")

    def test_no_token_one_token_and_one_expert(self):
        for num_experts, num_tokens in ((5, 0), (1, 1)):
            router = self.make(num_experts)
            layer = MoE(router=router, experts=MLPExperts(num_experts, 4))
            tokens = self.tokens(num_tokens)
            outputs, d_tokens, d_weights = self.outputs_and_gradients(
                _built(layer), tokens, losses=True, training=True
            )
            self.assertEqual(outputs.shape, (num_tokens, 6))
            for value in (outputs, d_tokens, *d_weights.values()):
                self.assertTrue(np.all(np.isfinite(value)))

    def test_masked_tokens_change_nothing(self):
        tokens = self.tokens()
        mask = np.arange(12) < 8
        poisoned = np.where(mask[:, None], tokens, np.nan).astype("float32")
        results = []
        for inputs, keep in ((tokens[:8], None), (poisoned, mask)):
            keras.utils.set_random_seed(3)
            layer = _built(DenseWeights(self.make(5)))
            if keep is not None:
                keep = ops.convert_to_tensor(keep)
            results.append(self.run_as_moe_does(layer.router, inputs, keep))
        for alone, masked in zip(*results, strict=True):
            self.assert_relative(masked[: len(alone)], alone)
            self.assertTrue(np.all(np.asarray(masked[len(alone) :]) == 0))

    def run_as_moe_does(self, router, tokens, mask):
        layer = _built(
            MoE(
                router=router,
                experts=MLPExperts(5, 4, kernel_initializer="ones"),
                losses=None,
                statistics=None,
            )
        )
        outputs, d_tokens, d_weights = self.outputs_and_gradients(
            layer, tokens, losses=True, mask=mask, training=True
        )
        state = [
            ops.convert_to_numpy(v) for v in router.non_trainable_variables
        ]
        return [
            outputs,
            d_tokens,
            *d_weights.values(),
            *map(np.atleast_1d, state),
        ]

    def test_all_masked(self):
        layer = _built(MoE(router=self.make(5), experts=MLPExperts(5, 4)))
        outputs, d_tokens, d_weights = self.outputs_and_gradients(
            layer,
            np.full((3, 6), np.nan, "float32"),
            losses=True,
            mask=ops.zeros((3,), "bool"),
            training=True,
        )
        for value in (outputs, d_tokens, *d_weights.values()):
            self.assertTrue(np.all(value == 0))

    def test_nan_stays_nan(self):
        tokens = self.tokens()
        tokens[3] = np.nan
        layer = MoE(router=self.make(5), experts=MLPExperts(5, 4))
        outputs = ops.convert_to_numpy(layer(tokens))
        self.assertTrue(np.all(np.isnan(outputs[3])))
        self.assertTrue(np.all(np.isfinite(np.delete(outputs, 3, axis=0))))

    def test_config(self):
        router = self.make(5, name="gate", dtype="mixed_bfloat16")
        router.build((None, 6))
        again = type(router).from_config(router.get_config())
        again.build((None, 6))
        self.assertEqual(again.get_config(), router.get_config())
        again.set_weights(router.get_weights())
        tokens = self.tokens()
        self.assert_relative(
            again(tokens).expert_weights,
            ops.convert_to_numpy(router(tokens).expert_weights),
            0,
        )

    def test_fit_save_and_load(self):
        inputs = keras.Input((4, 6))
        layer = MoE(router=self.make(5), experts=MLPExperts(5, 8), name="moe")
        model = keras.Model(inputs, inputs + layer(inputs))
        model.compile(
            keras.optimizers.Adam(0.01),
            "mse",
            jit_compile=keras.config.backend() != "torch",
        )
        rng = np.random.default_rng(4)
        x = rng.normal(size=(32, 4, 6)).astype("float32")
        before = as_arrays(layer.router)
        losses = model.fit(
            x, np.sin(3 * x), batch_size=16, epochs=4, verbose=0
        ).history["loss"]
        self.assertLess(losses[-1], losses[0])
        for name, array in as_arrays(layer.router).items():
            self.assertNotAllClose(array, before[name], atol=1e-4)
        path = f"{self.get_temp_dir()}/model.keras"
        model.save(path)
        loaded = keras.models.load_model(path)
        self.assertAllEqual(
            model.predict(x, verbose=0), loaded.predict(x, verbose=0)
        )
        for old, new in zip(
            layer.router.variables,
            loaded.get_layer("moe").router.variables,
            strict=True,
        ):
            self.assertAllEqual(old, new)
        return layer.router

    def assert_raises_for(self, message, **kwargs):
        with self.assertRaisesRegex(ValueError, message):
            self.make(5, **kwargs)

    def test_dim_must_be_static(self):
        with self.assertRaisesRegex(ValueError, r"tokens_shape=\(None, None\)"):
            self.make(5).build((None, None))


def _built(layer):
    layer.build((None, 6))
    return layer
