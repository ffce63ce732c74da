import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.ops.entmax import entmax
from keras_moe.ops.entmax import entmax15
from keras_moe.ops.entmax import sparsemax
from tests import token_loop
from tests.test_case import TestCase


def entmax_by_bisection(x, alpha):
    """One row, from the definition, in float64."""
    x = (alpha - 1) * np.asarray(x, "float64")
    low, high = x.max() - 1, x.max()
    for _ in range(200):
        tau = (low + high) / 2
        p = np.maximum(x - tau, 0) ** (1 / (alpha - 1))
        low, high = (tau, high) if p.sum() >= 1 else (low, tau)
    return p


class Entmax(keras.layers.Layer):
    """`entmax` as a layer, with `alpha` or one trainable `alpha` a row."""

    def __init__(self, alpha, axis=-1, **kwargs):
        super().__init__(**kwargs)
        self.alpha = alpha
        self.axis = axis
        if isinstance(alpha, np.ndarray):
            self.alpha = self.add_weight(
                name="alpha", shape=alpha.shape, initializer="zeros"
            )
            self.alpha.assign(alpha)
        self.built = True

    def call(self, x):
        functions = {"sparsemax": sparsemax, "entmax15": entmax15}
        if isinstance(self.alpha, str):
            return functions[self.alpha](x, self.axis)
        return entmax(x, self.alpha, self.axis)


NAMED = {"sparsemax": 2.0, "entmax15": 1.5}


class EntmaxTest(TestCase):
    def logits(self, rows=7, size=6, scale=2.0):
        rng = np.random.default_rng(0)
        return (scale * rng.normal(size=(rows, size))).astype("float32")

    @parameterized.parameters("sparsemax", "entmax15", 1.05, 1.3, 1.5, 2, 2.5)
    def test_against_definition(self, alpha):
        x = self.logits()
        cotangent = np.random.default_rng(1).normal(size=x.shape)
        p, d_x, _ = self.outputs_and_gradients(Entmax(alpha), x, cotangent)
        alpha = NAMED.get(alpha, alpha)

        def rows(x):
            return np.stack([entmax_by_bisection(row, alpha) for row in x])

        self.assert_relative(p, rows(x))
        self.assertAllEqual(p > 0, rows(x) > 0)
        expected = token_loop.gradients(
            lambda arrays: np.sum(rows(arrays["x"]) * cotangent), {"x": x}
        )
        self.assert_relative(d_x, expected["x"], 1e-4)

    @parameterized.parameters(1.2, 1.7, 2.6)
    def test_gradient_of_alpha(self, start):
        x = self.logits(4)
        alpha = (start + 0.1 * np.arange(4)[:, None]).astype("float32")
        cotangent = np.random.default_rng(1).normal(size=x.shape)
        p, d_x, d_alpha = self.outputs_and_gradients(
            Entmax(alpha), x, cotangent
        )

        def rows(x, alpha):
            return np.stack(
                [
                    entmax_by_bisection(row, a)
                    for row, a in zip(x, alpha[:, 0], strict=True)
                ]
            )

        self.assert_relative(p, rows(x, alpha))
        expected = token_loop.gradients(
            lambda arrays: np.sum(rows(**arrays) * cotangent),
            {"x": x, "alpha": alpha},
        )
        self.assertGreater(np.abs(expected["alpha"]).max(), 0.01)
        self.assert_relative(d_alpha["alpha"], expected["alpha"], 1e-4)
        self.assert_relative(d_x, expected["x"], 1e-4)

    @parameterized.parameters(1.3, 1.7)
    def test_gradient_of_a_gradient(self, alpha):
        """Of the squared length of the gradient of `sum(p * c)`."""
        x = self.logits(1).astype("float64")
        c = np.random.default_rng(1).normal(size=x.shape)

        def length(x):
            p = entmax_by_bisection(x[0], alpha)
            s = np.where(p > 0, np.maximum(p, 1e-30) ** (2 - alpha), 0)
            return np.sum(np.square(s * (c - np.sum(s * c) / np.sum(s))))

        wanted = np.zeros(x.shape)
        for i in range(x.shape[1]):
            step = 1e-6 * np.eye(x.shape[1])[i]
            wanted[0, i] = (length(x + step) - length(x - step)) / 2e-6
        second = {
            "jax": second_gradient_jax,
            "tensorflow": second_gradient_tensorflow,
            "torch": second_gradient_torch,
        }[keras.config.backend()]
        self.assertGreater(np.abs(wanted).max(), 0.01)
        actual = second(
            lambda x: ops.sum(entmax(x, alpha) * ops.array(c, "float32")),
            ops.array(x, "float32"),
        )
        self.assert_relative(actual, wanted, 1e-4)

    def test_scalar_alpha(self):
        x = self.logits(3)
        cotangent = np.random.default_rng(1).normal(size=x.shape)
        p, _, d_alpha = self.outputs_and_gradients(
            Entmax(np.array(1.4, "float32")), x, cotangent
        )

        def objective(arrays):
            rows = [entmax_by_bisection(row, arrays["a"]) for row in x]
            return np.sum(np.stack(rows) * cotangent)

        expected = token_loop.gradients(objective, {"a": 1.4})["a"]
        self.assert_relative(d_alpha["alpha"], expected, 1e-4)
        self.assert_relative(ops.sum(ops.convert_to_tensor(p), -1), np.ones(3))

    def test_close_to_one_is_softmax(self):
        x = self.logits()
        softmax = np.stack([token_loop.softmax(row) for row in x])
        for alpha in (1.0001, 1.000001):
            p = entmax(ops.convert_to_tensor(x), alpha)
            # The limit differs by about (alpha - 1) * x ** 2 / 2.
            self.assert_relative(p, softmax, 10 * (alpha - 1) + 1e-6)

    @parameterized.parameters("sparsemax", "entmax15", 1.2, 3.0)
    def test_axis(self, alpha):
        x = np.moveaxis(self.logits(6).reshape(2, 3, 6), -1, 1).copy()
        p = ops.convert_to_numpy(Entmax(alpha, 1)(x))
        last = np.moveaxis(x, 1, -1).copy()
        self.assert_relative(
            np.moveaxis(p, 1, -1), ops.convert_to_numpy(Entmax(alpha)(last))
        )
        self.assert_relative(p.sum(axis=1), np.ones((2, 3)))

    @parameterized.parameters("sparsemax", "entmax15", 1.1, 2.5)
    def test_extreme_rows(self, alpha):
        inf = np.inf
        x = np.array(
            [
                [3e38, 0.0, -3e38],
                [-inf, 1.0, 1.0],
                [-inf, -1e4, -inf],
                [-inf, -inf, -inf],
                [1e6, 1e6 + 0.125, -inf],
                [7.0, 7.0, 7.0],
            ],
            "float32",
        )
        p, d_x, _ = self.outputs_and_gradients(
            Entmax(alpha), x, np.arange(18.0).reshape(6, 3)
        )
        self.assertAllClose(
            p[[0, 1, 2, 3, 5]],
            [[1, 0, 0], [0, 0.5, 0.5], [0, 1, 0], [0, 0, 0], [1 / 3] * 3],
            atol=1e-6,
        )
        close = entmax_by_bisection([0, 0.125], NAMED.get(alpha, alpha))
        self.assertAllClose(p[4], [*close, 0], atol=1e-6)
        self.assertTrue(np.all(np.isfinite(d_x)))
        self.assertAllEqual(d_x[p == 0], np.zeros(np.sum(p == 0)))

    @parameterized.parameters("sparsemax", "entmax15", 1.3)
    def test_nan_makes_its_row_nan(self, alpha):
        x = self.logits(3)
        x[1, 2] = np.nan
        p = ops.convert_to_numpy(Entmax(alpha)(x))
        self.assertAllEqual(np.isnan(p).all(axis=-1), [False, True, False])
        self.assertEqual(np.isnan(p).sum(), 6)

    @parameterized.parameters("sparsemax", "entmax15", 1.3)
    def test_many_experts(self, alpha):
        # One ahead, all others close to the threshold: the sorted sums are of
        # no use there, if they are not mended.
        x = np.full((2, 512), -1.99, "float32")
        x[0, 0] = 0.0
        x[1] = self.logits(1, 512, 1.0)[0]
        p = ops.convert_to_numpy(Entmax(alpha)(x))
        for row, expected in zip(p, x, strict=True):
            expected = entmax_by_bisection(expected, NAMED.get(alpha, alpha))
            np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-6)

    @parameterized.parameters("float16", "bfloat16", "float64")
    def test_dtypes(self, dtype):
        if dtype == "float64" and keras.config.backend() == "jax":
            self.skipTest("JAX has no float64 unless told so as it starts.")
        x = ops.cast(ops.convert_to_tensor(self.logits()), dtype)
        tolerance = {"float16": 1e-3, "bfloat16": 5e-3, "float64": 1e-12}
        rows = ops.convert_to_numpy(ops.cast(x, "float32")).astype("float64")
        for alpha in ("sparsemax", "entmax15", 1.3):
            layer = Entmax(alpha, dtype=dtype)
            p = layer(x)
            self.assertDType(p, dtype)
            expected = np.stack(
                [entmax_by_bisection(r, NAMED.get(alpha, alpha)) for r in rows]
            )
            if dtype != "float64":
                p = ops.cast(p, "float32")
            self.assert_relative(p, expected, tolerance[dtype])

    def test_no_row_and_one_entry(self):
        for alpha in ("sparsemax", "entmax15", 1.3):
            self.assertEqual(
                tuple(Entmax(alpha)(np.zeros((0, 4), "float32")).shape), (0, 4)
            )
            self.assertAllClose(
                Entmax(alpha)(np.full((2, 1), -5.0, "float32")), [[1.0], [1.0]]
            )

    def test_errors(self):
        x = ops.zeros((2, 3))
        for alpha in (1, 0.5, np.inf, np.nan, True):
            with self.assertRaisesRegex(ValueError, f"alpha={alpha}$"):
                entmax(x, alpha)
        with self.assertRaisesRegex(ValueError, r"alpha.shape=\(2, 3\), axis"):
            entmax(x, ops.full((2, 3), 1.5))


def second_gradient_jax(value, x):
    import jax

    return jax.grad(lambda x: ops.sum(jax.grad(value)(x) ** 2))(x)


def second_gradient_tensorflow(value, x):
    import tensorflow as tf

    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            total = value(x)
        length = ops.sum(inner.gradient(total, x) ** 2)
    return outer.gradient(length, x)


def second_gradient_torch(value, x):
    import torch

    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(x), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]
