"""The fused experts under what only JAX does to a function."""

import keras
import numpy as np
import pytest
from absl.testing import parameterized

from keras_moe import backend
from tests.test_case import TestCase

pytestmark = pytest.mark.skipif(
    keras.config.backend() != "jax", reason="about JAX"
)
KERNELS = [
    np.random.default_rng(i).normal(size=shape).astype("float32")
    for i, shape in enumerate([(3, 4, 5), (3, 4, 5), (3, 5, 4)])
]


def hidden(gate, up):
    return keras.ops.silu(gate) * up


def arguments(seed, sizes):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(6, 4)).astype("float32"),
        rng.uniform(size=12).astype("float32"),
        rng.permutation(12).astype("int32"),
        np.array(sizes, "int32"),
    )


def total(*args):
    """Of the squares: its gradient depends on what comes out."""
    out = backend.FUSED_EXPERTS["row_blocks"](
        *args[:4], args[4], (None,) * 3, hidden
    )
    return keras.ops.sum(out**2)


class FusedJaxTest(TestCase):
    def gradients(self, function=total):
        import jax

        return jax.grad(function, argnums=(0, 1, 4))

    def assert_same(self, actual, wanted):
        import jax

        jax.tree.map(
            lambda a, w: self.assert_relative(np.asarray(a), np.asarray(w)),
            actual,
            wanted,
        )

    def test_checkpoint(self):
        import jax

        args = (*map(jax.numpy.asarray, arguments(0, (3, 5, 2))), KERNELS)
        wanted = self.gradients()(*args)
        again = jax.jit(self.gradients(jax.checkpoint(total)))
        self.assert_same(again(*args), wanted)

    def test_vmap(self):
        import jax

        several = [arguments(0, (3, 5, 4)), arguments(1, (0, 2, 9))]
        stacked = [np.stack(a) for a in zip(*several, strict=True)]
        axes = (0, 0, 0, 0, None)
        actual = jax.vmap(self.gradients(), axes)(*stacked, KERNELS)
        wanted = [
            self.gradients()(*map(jax.numpy.asarray, a), KERNELS)
            for a in several
        ]
        wanted = jax.tree.map(lambda *a: np.stack(a), *wanted)
        self.assert_same(actual, wanted)

    @pytest.mark.multi_device
    def test_tokens_on_several_devices(self):
        import jax
        from jax.sharding import NamedSharding
        from jax.sharding import PartitionSpec

        args = (*map(jax.numpy.asarray, arguments(0, (3, 5, 2))), KERNELS)
        wanted = self.gradients()(*args)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
        shared = NamedSharding(mesh, PartitionSpec("batch"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        places = (shared, *(everywhere,) * 4)
        args = [
            jax.device_put(a, place)
            for a, place in zip(args, places, strict=True)
        ]
        self.assert_same(jax.jit(self.gradients())(*args), wanted)

    @parameterized.parameters("second", "forward")
    def test_other_gradients_are_refused(self, kind):
        import jax

        args = (*map(jax.numpy.asarray, arguments(0, (3, 5, 2))), KERNELS)
        first = jax.grad(total)
        with self.assertRaisesRegex((TypeError, ValueError), "fori_loop|jvp"):
            if kind == "second":
                jax.grad(lambda x: first(x, *args[1:]).sum())(args[0])
            else:
                jax.jvp(lambda x: total(x, *args[1:]), args[:1], args[:1])

    def test_symbolic_sizes(self):
        """The blocks, and the places behind the last row, are others."""
        import jax
        from jax import export

        args = (*map(jax.numpy.asarray, arguments(0, (3, 5, 2))), KERNELS)
        tokens, rows = export.symbolic_shape("t, 2*t")
        shapes = ((tokens, 4), (rows,), (rows,), (3,))
        specs = [
            jax.ShapeDtypeStruct(shape, x.dtype)
            for shape, x in zip(shapes, args, strict=False)
        ]
        exported = export.export(jax.jit(self.gradients()))(*specs, KERNELS)
        self.assert_same(exported.call(*args), self.gradients()(*args))
