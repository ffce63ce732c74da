"""What every bank of experts is tried on: one row after the other in NumPy."""

import os

import keras
import numpy as np
from keras import ops

from tests import token_loop
from tests.test_case import TestCase


def weights_of(layer):
    return {
        v.path.split("/", 1)[1]: ops.convert_to_numpy(v).astype("float64")
        for v in layer.trainable_variables
    }


def compiled(layer, rows, group_sizes, **kwargs):
    """The outputs under the backend's compiler; torch has none here."""
    rows = ops.convert_to_tensor(rows)
    group_sizes = ops.convert_to_tensor(group_sizes, "int32")
    if keras.config.backend() == "jax":
        import jax

        trainable = [v.value for v in layer.trainable_variables]
        others = [v.value for v in layer.non_trainable_variables]
        call = jax.jit(
            lambda t, o, rows, sizes: layer.stateless_call(
                t, o, rows, sizes, **kwargs
            )[0]
        )
        return ops.convert_to_numpy(call(trainable, others, rows, group_sizes))
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        call = tf.function(
            lambda rows, sizes: layer(rows, sizes, **kwargs),
            jit_compile=True,
            input_signature=(
                tf.TensorSpec((None, *rows.shape[1:]), rows.dtype),
                tf.TensorSpec(group_sizes.shape, tf.int32),
            ),
        )
        return ops.convert_to_numpy(call(rows, group_sizes))
    return ops.convert_to_numpy(layer(rows, group_sizes, **kwargs))


class BankTestCase(TestCase):
    def check_bank(self, layer, rows, sizes, one_row, tolerance=1e-5, **kwargs):
        """Outputs, gradients and compiled outputs against a NumPy loop.

        `one_row(row, weights, expert)` is the formula, with the trainable
        weights by the end of their path. Unused rows hold NaN.
        """
        experts = np.repeat(np.arange(len(sizes)), sizes)
        rng = np.random.default_rng(7)
        clean = np.array(rows, "float64")
        rows = np.array(rows, "float32")
        rows[len(experts) :] = np.nan
        group_sizes = ops.array(sizes, "int32")
        if not layer.built:
            layer.build((None, *rows.shape[1:]))
        weights = weights_of(layer)

        def loop(arrays):
            outs = [
                one_row(arrays["rows"][i], arrays, e)
                for i, e in enumerate(experts)
            ]
            return np.stack(outs)

        wanted = loop({"rows": clean, **weights})
        cotangent = np.zeros((len(rows), *wanted.shape[1:]))
        cotangent[: len(experts)] = rng.normal(size=wanted.shape)
        out, d_rows, d_weights = self.outputs_and_gradients(
            layer, rows, cotangent, group_sizes=group_sizes, **kwargs
        )
        outputs = [out, compiled(layer, rows, sizes, **kwargs)]
        if keras.config.backend() == "tensorflow":  # elsewhere nothing new
            eager = layer(rows, group_sizes, **kwargs)
            outputs.append(ops.convert_to_numpy(eager))
        for actual in outputs:
            self.assertEqual(actual.shape, (len(rows), *wanted.shape[1:]))
            self.assert_relative(actual[: len(experts)], wanted, tolerance)
            self.assertTrue(np.isfinite(actual).all())
        gradients = token_loop.gradients(
            lambda arrays: np.sum(loop(arrays) * cotangent[: len(experts)]),
            {"rows": clean, **weights},
        )
        self.assert_relative(d_rows, gradients.pop("rows"), tolerance)
        self.assertEqual(set(d_weights), set(gradients))
        for name, gradient in gradients.items():
            self.assert_relative(d_weights[name], gradient, tolerance)
            # A bank of the weights of all experts.
            if len(gradient) == len(sizes) and "expert_" not in name:
                for e in np.flatnonzero(np.array(sizes) == 0):
                    self.assertAllEqual(d_weights[name][e], 0 * gradient[e])

    def check_no_rows(self, layer, row_shape, out_shape=None):
        """No rows at all, and unused rows alone."""
        layer.build((None, *row_shape))
        no_rows = [0] * layer.num_experts
        for number in (0, 3):
            rows = np.ones((number, *row_shape), "float32")
            wanted = (number, *(out_shape or row_shape))
            out, d_rows, d_weights = self.outputs_and_gradients(
                layer,
                rows,
                # TensorFlow's optimizer of graphs fails on empty constants.
                np.zeros(wanted) if number else None,
                group_sizes=ops.array(no_rows, "int32"),
                training=True,
            )
            self.assertEqual(out.shape, wanted)
            self.assertTrue(np.isfinite(out).all())
            self.assertAllEqual(d_rows, np.zeros(rows.shape))
            for gradient in d_weights.values():
                self.assertAllEqual(gradient, np.zeros(gradient.shape))
            self.assertEqual(compiled(layer, rows, no_rows).shape, wanted)

    def check_saving(self, layer, rows, sizes):
        """Config, and weights through a file."""
        again = self.run_class_serialization_test(layer)
        self.assertIsInstance(again, type(layer))
        sizes = ops.array(sizes, "int32")
        inputs = keras.Input(rows.shape[1:])
        x = _Grouped(layer, [int(s) for s in sizes])(inputs)
        model = keras.Model(inputs, x)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assertAllClose(
            model.predict(rows, verbose=0),
            loaded.predict(rows, verbose=0),
            atol=1e-6,
        )
        self.assertEqual(
            [v.path for v in model.weights], [v.path for v in loaded.weights]
        )

    def check_dtypes(self, make, rows, sizes):
        """`make(dtype)` under policies of half precision."""
        wanted, weights = None, ()
        for dtype in ("float32", "mixed_bfloat16", "mixed_float16"):
            layer = make(dtype)
            layer.build((None, *rows.shape[1:]))
            for v, value in zip(layer.weights, weights, strict=False):
                v.assign(value)
            weights = [ops.convert_to_numpy(v) for v in layer.weights]
            out = layer(ops.cast(rows, layer.compute_dtype), ops.array(sizes))
            self.assertEqual(
                keras.backend.standardize_dtype(out.dtype), layer.compute_dtype
            )
            out = ops.convert_to_numpy(ops.cast(out, "float32"))[: sum(sizes)]
            if wanted is None:
                wanted = out
            self.assert_relative(out, wanted, 4e-2)


@keras.saving.register_keras_serializable("keras_moe_tests")
class _Grouped(keras.layers.Layer):
    """A bank with fixed group sizes, so that a model can hold it."""

    def __init__(self, experts, sizes, **kwargs):
        super().__init__(**kwargs)
        self.experts = experts
        self.sizes = sizes

    def build(self, input_shape):
        if not self.experts.built:
            self.experts.build(input_shape)

    def call(self, rows):
        return self.experts(rows, ops.array(list(self.sizes), "int32"))

    def compute_output_shape(self, input_shape):
        return self.experts.compute_output_shape(input_shape)

    def get_config(self):
        experts = keras.saving.serialize_keras_object(self.experts)
        experts.pop("build_config", None)
        return {
            **super().get_config(),
            "experts": experts,
            "sizes": list(self.sizes),
        }

    @classmethod
    def from_config(cls, config):
        experts = keras.saving.deserialize_keras_object(config.pop("experts"))
        return cls(experts, **config)
