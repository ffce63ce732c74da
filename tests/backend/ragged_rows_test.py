"""Rows that travel without padding, against the padded way.

XLA has no such exchange for CPUs: a function that does what JAX documents
stands for it. What JAX makes of the call for accelerators is compiled only.
"""

from unittest import mock

import keras
import numpy as np
import pytest
from absl.testing import parameterized

from tests.test_case import TestCase

pytestmark = [
    pytest.mark.multi_device,
    pytest.mark.skipif(
        keras.config.backend() != "jax", reason="It is JAX's exchange."
    ),
]
OWNERS, EXPERTS, ROWS, DIM = 4, 8, 12, 3


def documented(
    operand,
    output,
    input_offsets,
    send_sizes,
    output_offsets,
    recv_sizes,
    *,
    axis_name,
):
    """`jax.lax.ragged_all_to_all`, by handing everything to everybody."""
    import jax.numpy as jnp
    from jax import lax

    rows, starts, sizes, targets = (
        lax.all_gather(x, axis_name)
        for x in (operand, input_offsets, send_sizes, output_offsets)
    )
    own = lax.axis_index(axis_name)
    for source in range(rows.shape[0]):
        place = jnp.arange(output.shape[0]) - targets[source, own]
        exists = (place >= 0) & (place < sizes[source, own])
        found = rows[source][(starts[source, own] + place) % operand.shape[0]]
        output = jnp.where(exists[:, None], found, output)
    expected = jnp.all(recv_sizes == sizes[:, own])
    return jnp.where(expected, output, jnp.nan)


def exchanged(ragged, slack, sizes, lower_for=None):
    """Outputs and gradients of all devices, or the program for a platform."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from keras_moe import backend

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(OWNERS * ROWS, DIM)).astype("float32")
    kernel = rng.normal(size=(EXPERTS, DIM, DIM)).astype("float32")
    d_outputs = rng.normal(size=(OWNERS * ROWS, DIM)).astype("float32")
    seed = jnp.zeros(2, "uint32")

    def compute(rows, experts, kernel, first, seeds):
        some = jnp.minimum(experts, kernel.shape[0] - 1)
        outputs = jnp.einsum("nd,ndf->nf", rows, kernel[some])
        return jnp.where((experts < kernel.shape[0])[:, None], outputs, 0.0)

    def on_device(rows, sizes, kernel):
        return backend.exchange_rows(
            *(rows, sizes[0], compute, kernel, [seed], "expert", slack),
            ragged=ragged,
        )

    devices = jax.devices()[:OWNERS]
    mesh = jax.sharding.Mesh(np.array(devices), ("expert",))
    part = PartitionSpec("expert")
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(part, part, part),
        out_specs=part,
        check_vma=False,
    )

    def everything(rows, kernel):
        outputs, gradients = jax.vjp(
            lambda r, k: run(r, sizes, k), rows, kernel
        )
        return outputs, *gradients(jnp.asarray(d_outputs))

    if lower_for:
        traced = jax.jit(everything).trace(rows, kernel)
        return traced.lower(lowering_platforms=(lower_for,)).as_text()
    return jax.jit(everything)(rows, kernel)


SIZES = {
    "even": np.full((OWNERS, EXPERTS), 1),
    "all_to_one": np.eye(EXPERTS, dtype=int)[[5] * OWNERS] * ROWS,
    "some_have_none": np.array(
        [
            [0] * 8,
            [0, 7, 0, 0, 0, 0, 0, 2],
            [3, 0, 1, 2, 0, 4, 1, 0],
            [0, 0, 0, 12, 0, 0, 0, 0],
        ]
    ),
}


class RaggedRowsTest(TestCase):
    @parameterized.product(sizes=list(SIZES), slack=[0.0, 10.0])
    def test_as_with_padding(self, sizes, slack):
        sizes = SIZES[sizes].astype("int32")
        padded = exchanged(False, slack, sizes)
        with mock.patch("jax.lax.ragged_all_to_all", documented):
            ragged = exchanged(True, slack, sizes)
        self.assertGreater(np.abs(padded[0]).max(), 0.1)
        for one, other in zip(padded, ragged, strict=True):
            self.assertAllClose(one, other, atol=1e-6)

    @parameterized.parameters("tpu", "cuda")
    def test_programs_for_accelerators(self, platform):
        text = exchanged(True, 0.0, SIZES["even"].astype("int32"), platform)
        self.assertIn("ragged_all_to_all", text)

    def test_devices(self):
        from keras_moe.distribution import ExpertParallel

        with self.assertRaisesRegex(ValueError, "XLA cannot do it on CPUs"):
            ExpertParallel(num_expert_shards=2, exchange="ragged")
        with self.assertRaisesRegex(ValueError, "`exchange` must be"):
            ExpertParallel(num_expert_shards=2, exchange="dense")
