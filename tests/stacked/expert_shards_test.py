"""Banks that hold a share of the experts, without any other process."""

import os
import tempfile

import keras
import numpy as np
from absl.testing import parameterized

from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.stacked import expert_shards
from tests.test_case import TestCase

EXPERTS, DIM = 6, 3


def bank(shard=None, routed=True, **kwargs):
    experts = GLUExperts(EXPERTS, 4, **kwargs)
    experts.routed = routed
    with expert_shards.dividing(shard):
        experts.build((None, DIM))
    return experts


class CountingDraws(keras.initializers.Initializer):
    """The n-th draw is n."""

    def __init__(self):
        self.count = 0

    def __call__(self, shape, dtype=None):
        self.count += 1
        return keras.ops.full(shape, self.count, dtype)


class ExpertShardsTest(TestCase):
    @parameterized.parameters(
        lambda: keras.initializers.GlorotUniform(seed=3),
        lambda: "zeros",
        CountingDraws,
    )
    def test_shares_are_those_of_the_whole_bank(self, make):
        whole = bank(kernel_initializer=make())
        for index in range(3):
            shard = expert_shards.ExpertShard(index, 3)
            own = bank(shard, kernel_initializer=make())
            for variable, all_of_it in zip(
                own.variables, whole.variables, strict=True
            ):
                self.assertEqual(variable.shape[0], 2)
                self.assertAllClose(
                    variable, all_of_it[2 * index : 2 * index + 2], atol=0
                )
                self.assertIs(expert_shards.mark_of(variable).shard, shard)
                self.assertIsNone(expert_shards.mark_of(all_of_it))

    def test_own_draws_only(self):
        drawn = []

        class Drawn(keras.initializers.RandomNormal):
            def __call__(self, shape, dtype=None):
                drawn.append(self.seed)
                return super().__call__(shape, dtype)

        bank(expert_shards.ExpertShard(1, 3), kernel_initializer=Drawn(seed=1))
        self.assertLen(set(drawn), 3 * 2)  # three kernels of two experts

    def test_shared_experts_stay_whole(self):
        with expert_shards.dividing(expert_shards.ExpertShard(0, 3)):
            layer = MoE(EXPERTS, 4, shared_experts=GLUExperts(3, 4))
            layer.build((None, DIM))
        self.assertEqual(layer.experts.up_kernel.shape[0], 2)
        self.assertEqual(layer.shared_experts.up_kernel.shape[0], 3)

    def test_penalties_add_up_to_those_of_the_whole_bank(self):
        kwargs = {
            "kernel_initializer": keras.initializers.GlorotUniform(seed=3),
            "kernel_regularizer": "l2",
        }
        penalty = lambda bank: sum(map(keras.ops.convert_to_numpy, bank.losses))
        wanted = penalty(bank(**kwargs))
        shares = [
            bank(expert_shards.ExpertShard(index, 3), **kwargs)
            for index in range(3)
        ]
        found = [penalty(share) for share in shares]
        self.assertAllClose(np.mean(found), wanted, rtol=1e-6)

    @parameterized.parameters(
        (4, "nearest for 6 experts: 3 and 6"), (7, "for 6 experts: 6. Received")
    )
    def test_impossible_divisions(self, count, pattern):
        with self.assertRaisesRegex(ValueError, pattern):
            bank(expert_shards.ExpertShard(0, count))

    @parameterized.parameters("bank_regularizer", "activity_regularizer")
    def test_regularizers_of_all_experts(self, name):
        with self.assertRaisesRegex(ValueError, f"{name}=<"):
            bank(expert_shards.ExpertShard(0, 2), **{name: "l2"})
        bank(expert_shards.ExpertShard(0, 1), **{name: "l2"})

    def test_files(self):
        x = keras.Input((DIM,))
        whole = keras.Model(x, MoE(EXPERTS, 4)(x))
        shard = expert_shards.ExpertShard(1, 2)
        with expert_shards.dividing(shard):
            own = keras.Model(x, MoE(EXPERTS, 4)(x))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "whole.weights.h5")
            whole.save_weights(path)
            own.load_weights(path)
            for variable, all_of_it in zip(
                own.variables, whole.variables, strict=True
            ):
                value = keras.ops.convert_to_numpy(all_of_it)
                if expert_shards.mark_of(variable) is not None:
                    value = value[3:]
                self.assertAllClose(variable, value, atol=0)
            with self.assertRaisesRegex(RuntimeError, "distribute"):
                own.save_weights(path)
            # What a distributed model gathers.
            shard.full_values = {
                id(a): keras.ops.convert_to_numpy(b) + 1
                for a, b in zip(own.variables, whole.variables, strict=True)
            }
            own.save_weights(path)
            before = whole.layers[1].experts.up_kernel.numpy()
            whole.load_weights(path)
            self.assertAllClose(
                whole.layers[1].experts.up_kernel, before + 1, atol=0
            )

    def test_files_of_other_experts(self):
        x = keras.Input((DIM,))
        whole = keras.Model(x, MoE(EXPERTS + 2, 4)(x))
        with expert_shards.dividing(expert_shards.ExpertShard(1, 2)):
            own = keras.Model(x, MoE(EXPERTS, 4)(x))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "whole.weights.h5")
            whole.save_weights(path)
            with self.assertRaisesRegex(ValueError, "shape"):
                own.load_weights(path)
