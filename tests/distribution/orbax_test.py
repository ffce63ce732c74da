"""Checkpoints that each device writes its own part of (JAX and Orbax)."""

import tempfile

import keras
import pytest
from keras import ops

from tests.distribution import mesh_cases
from tests.test_case import TestCase

pytestmark = [
    pytest.mark.multi_device,
    pytest.mark.skipif(
        keras.config.backend() != "jax",
        reason="on the other backends Orbax writes from one process",
    ),
    # Orbax says where it takes the layout from.
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]


class OrbaxTest(TestCase):
    def test_read_on_other_numbers_of_devices(self):
        folder = tempfile.mkdtemp()
        with mesh_cases.expert_parallel(4).scope():
            model = mesh_cases.make_model(mesh_cases.everything)
            x, mask, y = mesh_cases.data()
            model.fit(
                *((x, mask), y, 8),
                verbose=0,
                callbacks=[keras.callbacks.OrbaxCheckpoint(folder)],
            )
        with mesh_cases.expert_parallel(2).scope():
            loaded = keras.saving.load_model(folder)
            bank = mesh_cases.moe_of(loaded).experts.up_kernel.value
            experts = bank.addressable_shards[0].data.shape[0]
            self.assertEqual(experts, mesh_cases.EXPERTS // 2)
        # A plain file of it, for one device.
        path = f"{tempfile.mkdtemp()}/model.keras"
        loaded.save(path)
        for other in (loaded, keras.saving.load_model(path)):
            for (name, value), (_, expected) in zip(
                mesh_cases.numbers(other),
                mesh_cases.numbers(model),
                strict=True,
            ):
                with self.subTest(name):
                    self.assertAllEqual(value, ops.convert_to_numpy(expected))
