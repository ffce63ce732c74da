"""Routers and experts of one's own in `SoftMoEBackbone`."""

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.experts import GLUExperts
from keras_moe.experts import MLPExperts
from keras_moe.models import SoftMoEBackbone
from keras_moe.routers import SoftRouter
from tests.test_case import TestCase
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import randomize
from tests.vision.models.tiny import soft_moe


def own(**kwargs):
    return soft_moe(**{"slots_per_expert": None, **kwargs})


class PartsTest(TestCase):
    def test_each_block_has_its_own(self):
        router = SoftRouter(4, 3, normalization="rms", mix_normalized=True)
        experts = MLPExperts(4, 6, activation="gelu")
        backbone = randomize(
            own(router=router, experts=experts, moe_layers=[0, 1])
        )
        layers = [backbone.block(i).feed_forward for i in (0, 1)]
        self.assertLen({id(layer.router) for layer in layers} | {id(router)}, 3)
        self.assertLen(
            {id(layer.experts) for layer in layers} | {id(experts)}, 3
        )
        for layer in layers:
            self.assertEqual(layer.router.slots_per_expert, 3)
            self.assertEqual(layer.router.normalization, "rms")
            self.assertEqual(layer.experts.up_kernel.shape, (4, 8, 6))
        wanted = ops.convert_to_numpy(backbone(IMAGES))
        path = self.get_temp_dir() + "/model.keras"
        backbone.save(path)
        loaded = keras.saving.load_model(path)
        for layer in (loaded.block(0), backbone.block(0)):
            self.assertTrue(layer.feed_forward.router.mix_normalized)
        self.assert_relative(loaded(IMAGES), wanted)
        folder = self.get_temp_dir() + "/preset"
        backbone.save_to_preset(folder)
        loaded = SoftMoEBackbone.from_preset(folder)
        self.assert_relative(loaded(IMAGES), wanted)

    def test_lists(self):
        backbone = own(
            moe_layers=[0, 1],
            num_experts=[2, 3],
            router=[SoftRouter(2, 5), None],
            experts=[None, GLUExperts(3, 7)],
        )
        first, second = (backbone.block(i).feed_forward for i in (0, 1))
        self.assertEqual(first.router.slots_per_expert, 5)
        self.assertEqual(second.router.slots_per_expert, 1)
        self.assertEqual(first.experts.intermediate_dim, 12)
        self.assertIsInstance(second.experts, GLUExperts)

    def test_slots_mix_unit_tokens(self):
        """With one slot all tokens get the same, whatever their lengths."""
        options = {"num_experts": 1, "moe_layers": [0], "num_layers": 1}
        given, default = (
            own(router=router, **options)
            for router in (SoftRouter(1, mix_normalized=True), None)
        )
        randomize(given)
        default.set_weights(given.get_weights())
        difference = ops.convert_to_numpy(given(IMAGES) - default(IMAGES))
        self.assertGreater(np.abs(difference).max(), 1e-2)
        layer = given.block(0).feed_forward
        x = np.random.default_rng(2).normal(size=(1, 3, 8)).astype("float32")
        units = x / np.linalg.norm(x, axis=-1, keepdims=True)
        weights = ops.convert_to_numpy(layer.route(x).dispatch_weights)
        slot = np.einsum("l,ld->d", weights[0, :, 0, 0], units[0])
        row = layer.experts(slot[None], ops.array([1], "int32"))
        self.assert_relative(
            layer(x), np.tile(ops.convert_to_numpy(row), (1, 3, 1)), 1e-4
        )

    @parameterized.named_parameters(
        ("router", {"router": "top_k"}, "`router` must be 'soft' or a Soft"),
        ("number", {"router": SoftRouter(3)}, "must agree on the number"),
        (
            "slots",
            {"router": SoftRouter(4), "slots_per_expert": 2},
            "`slots_per_expert` can only be given if `router` is a name",
        ),
        (
            "noise",
            {"router": SoftRouter(4), "router_noise": 0.5},
            "argument of the `router`.* Received: router_noise=0.5",
        ),
        (
            "dropout",
            {"experts": MLPExperts(4, 2), "expert_dropout": 0.5},
            "argument of the `experts`.* Received: expert_dropout=0.5",
        ),
        ("experts", {"experts": 3}, "`experts` must be"),
        ("list", {"router": [None, None]}, "each of the 1 blocks"),
    )
    def test_errors(self, arguments, words):
        with self.assertRaisesRegex(ValueError, words):
            own(**arguments)
