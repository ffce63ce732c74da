"""Data parallelism: nothing counted twice, nothing drifts apart.

TensorFlow's MirroredStrategy runs on two logical CPU devices, JAX's
`keras.distribution.DataParallel` on four simulated ones (see conftest.py).
On torch, Keras 3.15 has no data parallelism; the support matrix says so.
"""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from keras_moe.losses import RoutingLoss
from keras_moe.routers import TopKRouter
from tests.replicas import two_replicas
from tests.test_case import TestCase

pytestmark = [
    pytest.mark.multi_device,
    pytest.mark.skipif(
        keras.config.backend() == "torch",
        reason="Keras 3.15 has no data parallelism on torch",
    ),
    # TensorFlow says that two devices on one machine do not need NCCL.
    pytest.mark.filterwarnings("ignore:.*NCCL"),
]
EXPERTS, TOP_K, EXAMPLES, LENGTH, DIM = 4, 2, 80, 3, 5


@contextlib.contextmanager
def data_parallel():
    if keras.config.backend() == "tensorflow":
        with two_replicas().scope():
            yield 2
    else:
        devices = keras.distribution.list_devices("cpu")[:4]
        assert len(devices) == 4, devices
        before = keras.distribution.distribution()
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(devices=devices)
        )
        try:
            yield 4
        finally:
            keras.distribution.set_distribution(before)


@contextlib.contextmanager
def single_device():
    yield 1


class ConstantLoss(RoutingLoss):
    """One, whatever the batch: what counts twice shows."""

    def call(self, routing, mask=None):
        return 1.0 + 0.0 * ops.sum(routing.probs)


def build_and_fit(learning_rate=0.1, epochs=1, **kwargs):
    """Ten steps of eight examples an epoch."""
    keras.utils.set_random_seed(4)
    rng = np.random.default_rng(5)
    x = rng.normal(size=(EXAMPLES, LENGTH, DIM)).astype("float32")
    router = kwargs.pop("router", None)
    layer = MoE(
        router=router or TopKRouter(EXPERTS, TOP_K, name="router"),
        intermediate_dim=6,
        name="moe",
        **kwargs,
    )
    inputs = keras.Input((LENGTH, DIM))
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    model.compile(keras.optimizers.SGD(learning_rate), "mse")
    history = model.fit(
        x, x[..., :1], batch_size=8, epochs=epochs, shuffle=False, verbose=0
    ).history
    return model, layer, history


class DataParallelTest(TestCase):
    def test_as_one_device(self):
        results = []
        for scope in (single_device, data_parallel):
            with scope():
                keras.utils.set_random_seed(4)
                model, layer, history = build_and_fit(
                    router=TopKRouter(
                        EXPERTS, TOP_K, expert_bias=True, name="router"
                    ),
                    losses=[LoadBalancingLoss(per="global"), ConstantLoss(1.0)],
                )
                weights = [
                    np.array(ops.convert_to_numpy(v)) for v in model.weights
                ]
                bias = ops.convert_to_numpy(layer.router.expert_bias)
                self.assertGreater(np.abs(bias).max(), 0.0)
                results.append((history, weights))
        (history, weights), (other_history, other_weights) = results
        for one, other in zip(weights, other_weights, strict=True):
            self.assertAllClose(one, other, atol=1e-5)
        self.assertEqual(set(history), set(other_history))
        for name, values in history.items():
            self.assertAllClose(values, other_history[name], atol=1e-5)
        # A constant that counted twice, or half, would show.
        self.assertGreater(history["loss"][0], 1.0)

    def test_statistics_are_those_of_the_whole_batch(self):
        arguments = {
            "learning_rate": 0.0,
            "capacity_factor": 0.5,
            "statistics": "per_expert",
        }
        with single_device():
            _, _, single = build_and_fit(**arguments)
        with data_parallel():
            _, layer, history = build_and_fit(epochs=2, **arguments)
            counts = ops.convert_to_numpy(layer.statistics.expert_counts)
            tokens = float(ops.convert_to_numpy(layer.statistics.token_count))
            result = layer.statistics.result()
        # Of the last epoch alone.
        self.assertEqual(tokens, EXAMPLES * LENGTH)
        self.assertEqual(counts.sum(), EXAMPLES * LENGTH * TOP_K)
        for e in range(EXPERTS):
            load = single[f"moe_load_{e}"][0]
            self.assertAllClose(history[f"moe_load_{e}"], [load, load])
            self.assertAllClose(result["expert_load"][e], load)
        entropy = single["routing_entropy"][0]
        self.assertAllClose(history["routing_entropy"], [entropy, entropy])
        self.assertGreater(history["routing_dropped_fraction"][-1], 0.0)

    def test_replicas_do_not_drift_apart(self):
        with data_parallel() as replicas:
            router = TopKRouter(
                EXPERTS, TOP_K, jitter=0.1, noise_stddev=0.1, seed=1
            )
            model, layer, history = build_and_fit(
                router=router, losses=[LoadBalancingLoss(1.0)]
            )
        self.assertTrue(np.isfinite(history["loss"]).all())
        own = {id(v) for v in layer.statistics.variables}
        compared = 0
        for variable in model.variables:
            if id(variable) in own:
                continue  # each replica's own counts, added up when read
            copies = _copies(variable)
            self.assertLen(copies, replicas)
            for copy in copies[1:]:
                self.assertAllEqual(copies[0], copy)
            compared += 1
        self.assertGreaterEqual(compared, 6)


def _copies(variable):
    """The value of a variable on each device."""
    value = variable.value
    if keras.config.backend() == "jax":
        return [np.asarray(shard.data) for shard in value.addressable_shards]
    return [copy.numpy() for copy in value.values]
