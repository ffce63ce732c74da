"""Every implementation of the grouped matmul against a NumPy loop."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe import backend
from keras_moe.ops import grouped_matmul
from keras_moe.ops import grouped_matmul_implementations
from tests.test_case import TestCase

GROUPS = {
    "uneven": (40, (17, 3, 12, 8)),
    "empty_first_and_last": (24, (0, 20, 4, 0)),
    "one_group_has_all": (33, (0, 0, 33, 0)),
    "rows_of_no_group": (40, (5, 0, 9, 1)),
    "nothing_assigned": (16, (0, 0, 0, 0)),
    "fewer_rows_than_groups": (3, (1, 0, 1, 1)),
    "one_row": (1, (0, 0, 1, 0)),
    "no_rows": (0, (0, 0, 0, 0)),
    "one_group": (50, (50,)),
    "many_blocks": (700, (300, 1, 0, 390)),
}
CASES = [
    (f"{implementation}_{name}", implementation, *group)
    for implementation in grouped_matmul_implementations()
    for name, group in GROUPS.items()
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


def expected(lhs, rhs, sizes, grad):
    """Product and gradients, one row at a time in float64."""
    out = np.zeros((len(lhs), rhs.shape[2]))
    d_lhs, d_rhs = np.zeros(lhs.shape), np.zeros(rhs.shape)
    for i, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out[i] = lhs[i] @ rhs[group]
        d_lhs[i] = grad[i] @ rhs[group].T
        d_rhs[group] += np.outer(lhs[i], grad[i])
    return out, d_lhs, d_rhs


def operands(num_rows, sizes, dim=8, width=16, dtype="float32", seed=0):
    """Random arrays, rounded as `dtype` rounds them, as float64."""
    rng = np.random.default_rng(seed)
    arrays = (
        rng.normal(size=(num_rows, dim)),
        rng.normal(size=(len(sizes), dim, width)),
        rng.normal(size=(num_rows, width)),
    )
    return [
        ops.convert_to_numpy(ops.cast(ops.cast(a, dtype), "float32")).astype(
            "float64"
        )
        for a in arrays
    ]


def run(lhs, rhs, sizes, grad, implementation, dtype="float32", jit=False):
    """Product and gradients of the library, as float32 arrays."""
    lhs, rhs, grad = (ops.cast(ops.array(a), dtype) for a in (lhs, rhs, grad))
    sizes = ops.array(sizes, "int32")
    name = keras.config.backend()
    if name == "jax":
        import jax

        def both(lhs, rhs, sizes, grad):
            out, pull = jax.vjp(
                lambda a, b: grouped_matmul(a, b, sizes, implementation),
                lhs,
                rhs,
            )
            return out, *pull(grad)

        results = (jax.jit(both) if jit else both)(lhs, rhs, sizes, grad)
    elif name == "tensorflow":
        import tensorflow as tf

        def both(lhs, rhs, sizes, grad):
            with tf.GradientTape() as tape:
                tape.watch((lhs, rhs))
                out = grouped_matmul(lhs, rhs, sizes, implementation)
            return out, *tape.gradient(out, (lhs, rhs), output_gradients=grad)

        if jit:
            both = tf.function(both, jit_compile=jit == "xla")
        results = both(lhs, rhs, sizes, grad)
    else:
        import torch

        lhs, rhs = lhs.requires_grad_(), rhs.requires_grad_()
        out = grouped_matmul(lhs, rhs, sizes, implementation)
        results = out.detach(), *torch.autograd.grad(out, (lhs, rhs), grad)
    return [ops.convert_to_numpy(ops.cast(r, "float32")) for r in results]


class GroupedMatmulTest(TestCase):
    def check(self, actual, wanted, tolerance):
        for a, w in zip(actual, wanted, strict=True):
            self.assert_relative(a, w, tolerance)

    def run_or_refuse(self, *args, **kwargs):
        """`None` where the implementation says that it cannot."""
        try:
            return run(*args, **kwargs)
        except NotImplementedError:
            return None

    @parameterized.named_parameters(CASES)
    def test_values_and_gradients(self, implementation, num_rows, sizes):
        lhs, rhs, grad = operands(num_rows, sizes)
        actual = self.run_or_refuse(lhs, rhs, sizes, grad, implementation)
        if actual is None:
            self.assertEqual((implementation, num_rows), ("grouped_mm", 0))
            return
        self.check(actual, expected(lhs, rhs, sizes, grad), 1e-5)

    @parameterized.named_parameters(
        (f"{i}_{d}", i, d)
        for i in grouped_matmul_implementations()
        for d in TOLERANCE
    )
    def test_dtypes(self, implementation, dtype):
        num_rows, sizes = GROUPS["uneven"]
        lhs, rhs, grad = operands(num_rows, sizes, dtype=dtype)
        actual = run(lhs, rhs, sizes, grad, implementation, dtype)
        wanted = expected(lhs, rhs, sizes, grad)
        self.check(actual, wanted, TOLERANCE[dtype])

    @parameterized.named_parameters(
        (f"{i}_{name}", i, *GROUPS[name])
        for i in grouped_matmul_implementations()
        for name in ("uneven", "rows_of_no_group", "many_blocks", "no_rows")
    )
    def test_compiled(self, implementation, num_rows, sizes):
        modes = {"jax": [True], "tensorflow": [True, "xla"], "torch": []}
        lhs, rhs, grad = operands(num_rows, sizes)
        wanted = expected(lhs, rhs, sizes, grad)
        for jit in modes[keras.config.backend()]:
            actual = self.run_or_refuse(
                lhs, rhs, sizes, grad, implementation, jit=jit
            )
            if actual is None:
                self.assertEqual((implementation, jit), ("expert_loop", "xla"))
                continue
            self.check(actual, wanted, 1e-5)

    @parameterized.named_parameters(
        (i, i) for i in grouped_matmul_implementations()
    )
    def test_nan_stays_in_its_row_and_group(self, implementation):
        sizes = (3, 2, 4, 0)
        lhs, rhs, grad = operands(11, sizes)
        lhs[4] = np.nan  # the last row of group 1
        lhs[10] = np.nan  # of no group
        grad[9] = np.nan  # of no group
        out, d_lhs, d_rhs = run(lhs, rhs, sizes, grad, implementation)
        np.testing.assert_array_equal(
            np.isnan(out).any(axis=1), np.arange(11) == 4
        )
        self.assertFalse(np.isnan(d_lhs).any())
        np.testing.assert_array_equal(
            np.isnan(d_rhs).any(axis=(1, 2)), [False, True, False, False]
        )

    def test_default_is_the_first_that_can_run(self):
        ran = []

        def spy(name, function):
            def call(*args):
                out = function(*args)
                ran.append(name)
                return out

            return call

        spies = {k: spy(k, f) for k, f in backend.GROUPED_MATMUL.items()}
        originals = dict(backend.GROUPED_MATMUL)
        backend.GROUPED_MATMUL.update(spies)
        try:
            for width in (16, 7):  # rows of 28 bytes are not aligned
                lhs, rhs, grad = operands(20, (8, 12), width=width)
                run(lhs, rhs, (8, 12), grad, None)
        finally:
            backend.GROUPED_MATMUL.update(originals)
        self.assertEqual(
            ran,
            {
                "jax": ["row_blocks", "row_blocks"],
                "tensorflow": ["expert_loop", "expert_loop"],
                "torch": ["grouped_mm", "expert_loop"],
            }[keras.config.backend()],
        )

    @parameterized.named_parameters(
        (f"{i}_{d}", i, d)
        for i in grouped_matmul_implementations()
        for d in ("bfloat16", "float16")
    )
    def test_gradients_do_not_add_up_in_half_precision(self, name, dtype):
        # 3000 ones are 256 in bfloat16, 2048 in float16, if added in these.
        ones = np.ones((3000, 8))
        grad = np.ones((3000, 8))
        _, _, d_rhs = run(ones, np.ones((1, 8, 8)), (3000,), grad, name, dtype)
        self.assertAllClose(d_rhs, np.full((1, 8, 8), 3000.0), rtol=4e-3)

    def test_second_gradients_are_refused_or_right(self):
        sizes = (3, 0, 4)
        lhs, rhs, _ = operands(8, sizes, width=8)
        lhs, rhs = lhs.astype("float32"), rhs.astype("float32")
        second = {
            "jax": second_gradient_jax,
            "tensorflow": second_gradient_tensorflow,
            "torch": second_gradient_torch,
        }[keras.config.backend()]
        # Of sum(tanh(x @ w)), by central differences of the first gradient.
        wanted = np.zeros(lhs.shape)
        matrices = np.repeat(rhs, sizes, axis=0).astype("float64")

        def first(x):
            y = np.einsum("nd,ndf->nf", x, matrices)
            return np.einsum("nf,ndf->nd", 1 - np.tanh(y) ** 2, matrices)

        x = lhs[: sum(sizes)].astype("float64")
        for index in np.ndindex(x.shape):
            step = np.zeros(x.shape)
            step[index] = 1e-6
            change = first(x + step).sum() - first(x - step).sum()
            wanted[index] = change / 2e-6
        for name in grouped_matmul_implementations():
            try:
                actual = second(lhs, rhs, sizes, name)
            except Exception as error:
                # JAX: loops of any length; XLA under TensorFlow: their lists.
                self.assertRegex(str(error), "fori_loop|list size")
                self.assertEqual(name, "row_blocks")
                continue
            self.assert_relative(actual, wanted, 1e-4)
            if keras.config.backend() == "torch":
                # The gradient of each row is the sum over the columns.
                total = 2 * rhs.sum(-1) * np.array(sizes)[:, None]
                penalty = gradient_penalty_torch(lhs, rhs, sizes, name)
                self.assert_relative(
                    penalty, np.broadcast_to(total[..., None], rhs.shape), 1e-5
                )

    def test_errors(self):
        lhs, rhs = ops.ones((3, 2)), ops.ones((2, 2, 4))
        with self.assertRaisesRegex(ValueError, r"rhs.shape=\(2, 4\)"):
            grouped_matmul(lhs, rhs[0], [1, 2])
        with self.assertRaisesRegex(ValueError, "agree on D"):
            grouped_matmul(lhs[:, :1], rhs, [1, 2])
        with self.assertRaisesRegex(ValueError, "on E"):
            grouped_matmul(lhs, rhs, [1, 1, 1])
        with self.assertRaisesRegex(ValueError, "same dtype"):
            grouped_matmul(ops.cast(lhs, "float16"), rhs, [1, 2])
        with self.assertRaisesRegex(ValueError, "implementation='magic'"):
            grouped_matmul(lhs, rhs, [1, 2], implementation="magic")


def second_gradient_jax(lhs, rhs, sizes, name):
    import jax

    def value(x):
        return ops.sum(ops.tanh(grouped_matmul(x, rhs, sizes, name)))

    return jax.grad(lambda x: ops.sum(jax.grad(value)(x)))(ops.array(lhs))


def second_gradient_tensorflow(lhs, rhs, sizes, name):
    import tensorflow as tf

    @tf.function(jit_compile=name == "row_blocks")
    def second(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                value = ops.sum(ops.tanh(grouped_matmul(x, rhs, sizes, name)))
            total = ops.sum(inner.gradient(value, x))
        return outer.gradient(total, x)

    return second(ops.array(lhs))


def second_gradient_torch(lhs, rhs, sizes, name):
    import torch

    x = torch.tensor(lhs, requires_grad=True)
    value = ops.sum(ops.tanh(grouped_matmul(x, torch.tensor(rhs), sizes, name)))
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    first.sum().backward()
    return x.grad


def gradient_penalty_torch(lhs, rhs, sizes, name):
    """Where the gradient that arrives is a constant."""
    import torch

    x = torch.tensor(lhs, requires_grad=True)
    rhs = torch.tensor(rhs, requires_grad=True)
    value = ops.sum(grouped_matmul(x, rhs, sizes, name))
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    first.square().sum().backward()
    return rhs.grad
