"""What could go wrong silently on a mesh of simulated devices (JAX)."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.distribution import ExpertParallel
from keras_moe.experts import GLUExperts
from keras_moe.experts import LayerExperts
from keras_moe.experts import LowRankExperts
from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter
from tests.test_case import TestCase

pytestmark = [
    pytest.mark.multi_device,
    pytest.mark.skipif(
        keras.config.backend() != "jax",
        reason="one program for all devices is JAX's way",
    ),
]
EXPERTS, LENGTH, DIM, WIDTH = 8, 3, 8, 12


def devices(number):
    return keras.distribution.list_devices("cpu")[:number]


def expert_parallel(expert, data=1, **kwargs):
    return ExpertParallel(
        expert, data, devices=devices(expert * data), **kwargs
    )


def data_parallel(number):
    return keras.distribution.DataParallel(devices=devices(number))


def inputs(examples=16):
    rng = np.random.default_rng(3)
    return rng.normal(size=(examples, LENGTH, DIM)).astype("float32")


def step(layer, x, training=True, **kwargs):
    """Outputs, losses, gradients and new state of a compiled step."""
    import jax

    def loss(trainable, x):
        state = [v.value for v in layer.non_trainable_variables]
        outputs, state, losses = layer.stateless_call(
            trainable, state, x, training=training, return_losses=True, **kwargs
        )
        factors = np.cos(np.arange(outputs.size)).reshape(outputs.shape)
        total = jax.numpy.sum(outputs * factors) + sum(losses)
        return total, (outputs, losses, state)

    weights = [v.value for v in layer.trainable_variables]
    results, gradients = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True)
    )(weights, x)
    return [np.asarray(x) for x in jax.tree.leaves((results, gradients))]


class MeshMoreTest(TestCase):
    def assert_same_step(self, layer, x, strategy, **kwargs):
        """As on one device; returns what the device computed."""
        layer.build(x.shape)
        wanted = step(layer, x, **kwargs)
        with strategy.scope():
            found = step(layer, x, **kwargs)
        for value, expected in zip(found, wanted, strict=True):
            self.assert_relative(value, expected, 1e-5)
        return wanted

    def test_dropout_in_rounds(self):
        """A round draws the same numbers in both passes, other than others."""
        bank = GLUExperts(EXPERTS, WIDTH, dropout=0.5, seed=1)
        router = TopKRouter(EXPERTS, 1, kernel_initializer="zeros")
        layer = MoE(router=router, experts=bank, losses=None, statistics=None)
        x = np.ones((64, LENGTH, DIM), "float32")
        layer.build(x.shape)
        before = ops.convert_to_numpy(bank.seed_generator.state)
        with expert_parallel(4, slack=0.0).scope():
            _, outputs, *state, _, _, _, _, _ = found = step(layer, x)
        names = [v.path for v in layer.trainable_variables]
        (place,) = [i for i, n in enumerate(names) if "down_kernel" in n]
        gradient = found[place - len(names) - 1]
        # The outputs are linear in this kernel.
        value = ops.convert_to_numpy(bank.down_kernel)
        factors = np.cos(np.arange(outputs.size)).reshape(outputs.shape)
        self.assertGreater(np.abs(gradient).max(), 0.1)
        self.assertAlmostEqual(
            float(np.sum(gradient * value)), float(np.sum(outputs * factors)), 3
        )
        drawn = {row.tobytes() for row in outputs.reshape(-1, DIM)}
        self.assertGreater(len(drawn), 150)  # of 192 tokens, 4,096 masks
        self.assertNotAllClose(state[0], before)

    def test_state_and_losses_of_experts(self):
        """They are of the whole batch."""
        template = keras.Sequential(
            [
                keras.layers.Dense(DIM, activity_regularizer="l2"),
                keras.layers.BatchNormalization(),
            ]
        )
        layer = MoE(
            router=TopKRouter(EXPERTS, 2),
            experts=LayerExperts(template, EXPERTS),
            losses=None,
        )
        self.assert_same_step(layer, inputs(), data_parallel(4))

    def test_activity_regularizer(self):
        def make(**kwargs):
            return MoE(
                router=TopKRouter(EXPERTS, 2),
                experts=GLUExperts(EXPERTS, WIDTH, **kwargs),
                shared_experts=GLUExperts(1, WIDTH, **kwargs),
            )

        layer = make(activity_regularizer="l2")
        self.assert_same_step(layer, inputs(), data_parallel(4))
        with expert_parallel(2).scope():
            with self.assertRaisesRegex(ValueError, "activity_regularizer"):
                step(layer, inputs())

    def test_experts_with_shared_weights(self):
        bank = LowRankExperts(
            EXPERTS,
            WIDTH,
            rank=2,
            use_bias=True,
            lora_b_initializer="glorot_uniform",
        )
        layer = MoE(router=TopKRouter(EXPERTS, 2), experts=bank)
        with expert_parallel(4).scope():
            layer.build((None, LENGTH, DIM))
        shards = [
            v.value.addressable_shards[0].data.shape[0] * 4 == v.shape[0]
            for v in bank.variables
        ]
        self.assertEqual(shards, ["lora" in v.path for v in bank.variables])
        self.assert_same_step(layer, inputs(), expert_parallel(4))

    def test_path_that_was_a_routed_bank(self):
        def bank(number):
            return GLUExperts(number, WIDTH, name="bank")

        with expert_parallel(2).scope():
            router = TopKRouter(EXPERTS, 1)
            layer = MoE(router=router, experts=bank(EXPERTS), name="a")
            layer.build((None, LENGTH, DIM))
            self.assertFalse(is_whole(layer.experts.up_kernel))
            layer = MoE(EXPERTS, WIDTH, shared_experts=bank(1), name="a")
            layer.build((None, LENGTH, DIM))
            self.assertTrue(is_whole(layer.shared_experts.up_kernel))

    def test_made_on_another_mesh(self):
        with expert_parallel(4).scope():
            layer = MoE(EXPERTS, WIDTH)
            layer.build((None, LENGTH, DIM))
        self.assert_same_step(layer, inputs(), data_parallel(4))


def is_whole(variable):
    return variable.value.addressable_shards[0].data.shape == variable.shape
