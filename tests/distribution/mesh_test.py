"""Experts and batch over simulated devices that one program drives (JAX)."""

import os
import tempfile

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe.distribution import ExpertParallel
from keras_moe.experts import GLUExperts
from keras_moe.experts import LayerExperts
from keras_moe.layers import MoE
from keras_moe.losses import LoadBalancingLoss
from keras_moe.losses import RouterZLoss
from keras_moe.routers import ExpertChoiceRouter
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
BATCH, STEPS = 16, 20


def devices(number):
    return keras.distribution.list_devices("cpu")[:number]


def expert_parallel(expert, data=1, **kwargs):
    return ExpertParallel(expert, data, devices(expert * data), **kwargs)


def data_parallel(number):
    return keras.distribution.DataParallel(devices=devices(number))


def data(examples=BATCH):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(examples, LENGTH, DIM)).astype("float32")
    y = rng.normal(size=(examples, LENGTH, DIM)).astype("float32")
    mask = rng.random((examples, LENGTH)) < 0.8
    # Whole devices may have no token.
    mask[:5] = False
    return x, mask, y


def everything():
    """The options that could go wrong together."""
    return MoE(
        router=TopKRouter(EXPERTS, 2, expert_bias=True, bias_update_rate=0.004),
        experts=GLUExperts(EXPERTS, WIDTH, use_bias=True),
        shared_experts=GLUExperts(2, WIDTH, name="shared"),
        losses=[LoadBalancingLoss(0.5), RouterZLoss(0.1)],
    )


def make_model(make_layer, optimizer=None):
    keras.utils.set_random_seed(0)
    x = keras.Input((LENGTH, DIM))
    mask = keras.Input((LENGTH,), dtype="bool")
    hidden = keras.layers.Dense(DIM)(x)
    hidden = hidden + make_layer()(hidden, mask=mask)
    model = keras.Model((x, mask), keras.layers.Dense(DIM)(hidden))
    optimizer = optimizer or keras.optimizers.Adam(
        0.01, global_clipnorm=0.5, gradient_accumulation_steps=2
    )
    model.compile(optimizer, "mse")
    return model


def fit(model, examples=BATCH * 2, batch=BATCH, epochs=STEPS // 2):
    x, mask, y = data(examples)
    history = model.fit(
        (x, mask), y, batch, epochs, verbose=0, shuffle=False
    ).history
    return {name: values[-1] for name, values in history.items()}


def trained(strategy, make_layer=everything, **kwargs):
    """`(model, logs)`."""
    if strategy is None:
        model = make_model(make_layer)
        return model, fit(model, **kwargs)
    with strategy.scope():
        model = make_model(make_layer)
        if isinstance(strategy, ExpertParallel):
            model = strategy.distribute(model)
        return model, fit(model, **kwargs)


def moe_of(model):
    return next(layer for layer in model.layers if isinstance(layer, MoE))


def numbers(model):
    """`(path, values)` of all variables but seeds, in their order."""
    return [
        (v.path, ops.convert_to_numpy(v))
        for v in (*model.variables, *model.optimizer.variables)
        if "seed" not in v.path
    ]


class MeshTest(TestCase):
    def assert_same(self, model, other):
        pairs = zip(numbers(model), numbers(other), strict=True)
        for (path, value), (_, expected) in pairs:
            with self.subTest(path):
                self.assert_relative(value, expected, 1e-5)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.alone = None

    def single(self):
        if type(self).alone is None:
            type(self).alone = trained(None)
        return type(self).alone

    def test_twenty_steps(self):
        model, logs = self.single()
        bias = ops.convert_to_numpy(moe_of(model).router.expert_bias)
        self.assertGreater(np.abs(bias).max(), 0.01)
        for strategy in (
            expert_parallel(2, 4),
            expert_parallel(4, slack=0.0),
            data_parallel(2),
        ):
            with self.subTest(strategy=strategy):
                other, other_logs = trained(strategy)
                self.assert_same(other, model)
                self.assertEqual(set(other_logs), set(logs))
                for name, value in logs.items():
                    self.assertAlmostEqual(other_logs[name], value, 5)

    def test_memory(self):
        strategy = expert_parallel(4, slack=0.0)
        with strategy.scope():
            model = make_model(everything)
            model.optimizer.build(model.trainable_variables)
        found = 0
        for v in (*model.variables, *model.optimizer.variables):
            whole = v.value.addressable_shards[0].data.size == v.value.size
            routed = "glu_experts" in v.path
            self.assertEqual(whole, not routed, v.path)
            if routed:
                shard = v.value.addressable_shards[0].data.shape
                self.assertEqual(shard, (EXPERTS // 4, *v.shape[1:]))
                found += 1
        self.assertEqual(found, 6 * 4)  # Adam's moments, accumulated gradients

    def test_saved_on_other_numbers_of_devices(self):
        """The optimizer goes on too."""
        model, _ = self.single()
        path = os.path.join(tempfile.mkdtemp(), "model.keras")
        with expert_parallel(4).scope():
            other = make_model(everything)
            fit(other, epochs=STEPS // 4)
            other.save(path)
        with expert_parallel(2).scope():
            again = keras.saving.load_model(path)
            bank = moe_of(again).experts.gate_kernel
            shard = bank.value.addressable_shards[0].data.shape
            self.assertEqual(shard, (EXPERTS // 2, DIM, WIDTH))
            fit(again, epochs=STEPS // 4)
        self.assert_same(again, model)
        again.save(path)
        self.assert_same(keras.saving.load_model(path), model)

    def test_all_tokens_to_one_expert(self):
        """More rows for one owner than a round has room for, none for others."""
        layer = MoE(
            router=TopKRouter(EXPERTS, 1, expert_bias=True),
            experts=GLUExperts(EXPERTS, WIDTH),
            losses=None,
            statistics=None,
        )
        with expert_parallel(4, slack=0.0).scope():
            layer.build((None, LENGTH, DIM))
            layer.router.expert_bias.assign([0, 0, 0, 9, 0, 0, 0, 0])
        x = data()[0]
        dy = np.random.default_rng(1).normal(size=x.shape).astype("float32")
        wanted = self.outputs_and_gradients(layer, x, dy)
        with expert_parallel(4, slack=0.0).scope():
            found = self.outputs_and_gradients(layer, x, dy)
        self.assert_relative(found[0], wanted[0])
        self.assert_relative(found[1], wanted[1])
        for name, gradient in wanted[2].items():
            self.assert_relative(found[2][name], gradient)
