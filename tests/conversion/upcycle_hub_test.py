"""Encoders of keras-hub, where it is installed."""

import importlib.util
import os

import keras
import numpy as np
import pytest
from absl.testing import parameterized
from keras import ops

from keras_moe.conversion import upcycle
from keras_moe.conversion import upcycled_class
from keras_moe.conversion.sublayers import with_sublayers
from keras_moe.experts import GLUExperts
from keras_moe.layers import MoE
from keras_moe.ops import activations
from tests.conversion.upcycle_test import run_alone
from tests.test_case import TestCase
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import randomize

if importlib.util.find_spec("keras_hub") is None:
    pytest.skip("keras-hub is not installed", allow_module_level=True)

from keras_hub import layers  # noqa: E402
from keras_hub import models  # noqa: E402

SIZES = {
    "image_shape": (8, 8, 3),
    "patch_size": 4,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 8,
}
MLP = {"intermediate_dim": 12}
DINO = {**MLP, "use_mask_token": False}
DINO_V2 = {**DINO, "position_embedding_shape": (8, 8, 3)}
TOKENS = np.random.default_rng(2).normal(size=(3, 5, 8)).astype("float32")
GELU, SILU = keras.activations.gelu, keras.activations.silu

# The class, its arguments, and activation and weights of its feed-forwards.
ENCODERS = {
    "vit": ("ViTBackbone", {"mlp_dim": 12, "dropout_rate": 0.1}, GELU, 4),
    "vit_no_bias": (
        "ViTBackbone",
        {"mlp_dim": 12, "use_mlp_bias": False},
        GELU,
        2,
    ),
    "deit": ("DeiTBackbone", MLP, GELU, 4),
    "dino_v2": ("DINOV2Backbone", DINO_V2, GELU, 4),
    "dino_v2_gated": (
        "DINOV2Backbone",
        {**DINO_V2, "use_swiglu_ffn": True},
        SILU,
        4,
    ),
    "dino_v3": ("DINOV3Backbone", DINO, GELU, 4),
    "dino_v3_gated": (
        "DINOV3Backbone",
        {**DINO, "use_gated_mlp": True, "hidden_activation": "silu"},
        SILU,
        6,
    ),
    "siglip": ("SigLIPVisionEncoder", MLP, activations.get("gelu_tanh"), 4),
    "clip": ("CLIPVisionEncoder", MLP, activations.get("quick_gelu"), 4),
}
NAMES = [(name, name) for name in ENCODERS]


def make(name, **kwargs):
    kind, options, *_ = ENCODERS[name]
    return randomize(getattr(models, kind)(**{**SIZES, **options, **kwargs}))


def inputs_of(model, images):
    """The images, by the name that some models ask for."""
    if isinstance(model.input, dict):
        return dict.fromkeys(model.input, images)
    return images


def call(model, images=IMAGES):
    outputs = model(inputs_of(model, images))
    return ops.convert_to_numpy(ops.cast(outputs, "float32"))


class HubTest(TestCase):
    @parameterized.named_parameters(NAMES)
    def test_encoder(self, name):
        dense = make(name)
        wanted = call(dense)
        self.assertGreater(wanted.std(), 0.1)
        model = upcycle(dense, 4, layers=[0, 2])
        self.assertIsInstance(model, type(dense))
        self.assert_relative(call(model), wanted)
        self.assert_relative(call(dense), wanted)
        found = [p for p in with_sublayers(model) if isinstance(p, MoE)]
        self.assertLen(found, 2)
        _, _, activation, weights = ENCODERS[name]
        for moe in found:
            self.assertEqual(moe.experts.activation, activation)
            gated = isinstance(moe.experts, GLUExperts)
            self.assertEqual(gated, name.endswith("gated"))
        # No weight of the two dense networks is left, and no other is gone.
        kept = [
            w.path for w in model.trainable_weights if "/moe/" not in w.path
        ]
        gone = len(dense.trainable_weights) - len(kept)
        self.assertEqual(gone, 2 * weights)
        if keras.config.backend() == "torch":
            parameters = {id(p) for p in model.parameters()}
            variables = {id(v.value) for v in model.variables}
            self.assertEqual(parameters, variables)
        # Fine-tuned, it is saved and loaded as a file and as a preset.
        model.compile("adam", "mse")
        model.fit(inputs_of(model, IMAGES), np.zeros_like(wanted), verbose=0)
        tuned = call(model)
        self.assertGreater(np.abs(tuned - wanted).max(), 1e-4)
        folder = self.get_temp_dir()
        path = os.path.join(folder, "model.keras")
        model.save(path)
        self.assert_relative(call(keras.saving.load_model(path)), tuned, 1e-6)
        model.save_to_preset(folder)
        loaded = type(dense).from_preset(folder)
        self.assertIs(type(loaded), upcycled_class(type(dense)))
        self.assert_relative(call(loaded), tuned, 1e-6)

    def test_pooling_head_stays(self):
        dense = make("siglip")
        upcycled = upcycle(dense, 4, layers="all")
        self.assertIs(type(upcycled.head.mlp), type(dense.head.mlp))
        left = [p for p in with_sublayers(upcycled) if p.name == "mlp"]
        self.assertLen(left, 1)
        with self.assertRaisesRegex(ValueError, "has experts"):
            upcycle(upcycled, 4)

    def test_channels_first_and_mixed_precision(self):
        """keras-hub does not save the data format."""
        images = IMAGES.transpose(0, 3, 1, 2).copy()
        dense = make(
            "vit",
            image_shape=(3, 8, 8),
            data_format="channels_first",
            dtype="mixed_bfloat16",
        )
        model = upcycle(dense, 4)
        self.assert_relative(call(model, images), call(dense, images), 3e-2)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assert_relative(call(loaded, images), call(model, images), 1e-3)

    def test_classifier(self):
        dense = randomize(models.ViTImageClassifier(make("vit"), num_classes=3))
        dense.backbone.trainable = False
        model = upcycle(dense, 4, layers="all")
        self.assertIsInstance(model, models.ViTImageClassifier)
        self.assert_relative(call(model), call(dense))
        self.assertLen(model.trainable_weights, 2)
        folder = self.get_temp_dir()
        model.save_to_preset(folder)
        loaded = models.ImageClassifier.from_preset(folder)
        self.assert_relative(call(loaded), call(dense))

    @parameterized.parameters(True, False)
    def test_transformer_encoder(self, normalize_first):
        inputs = x = keras.Input((None, 8))
        for _ in range(2):
            x = layers.TransformerEncoder(
                12,
                2,
                activation="gelu",
                dropout=0.1,
                normalize_first=normalize_first,
            )(x)
        dense = randomize(keras.Model(inputs, x))
        model = upcycle(dense, 4, layers=[1])
        self.assert_relative(model(TOKENS), ops.convert_to_numpy(dense(TOKENS)))
        self.assertIs(type(model), type(dense))
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assert_relative(
            loaded(TOKENS), ops.convert_to_numpy(dense(TOKENS))
        )

    def test_fresh_process(self):
        folder = self.get_temp_dir()
        model = upcycle(make("clip"), 4)
        model.save(os.path.join(folder, "model.keras"))
        model.save_to_preset(folder)
        np.save(os.path.join(folder, "images.npy"), IMAGES)
        run_alone(
            f"""
import os
import keras, numpy as np
import keras_moe
os.chdir({folder!r})
images = {{"images": np.load("images.npy")}}
loaded = keras.saving.load_model("model.keras")
np.save("0", keras.ops.convert_to_numpy(loaded(images)))
import keras_hub
keras_moe.conversion.upcycled_class(keras_hub.models.CLIPVisionEncoder)
loaded = keras_hub.models.Backbone.from_preset({folder!r})
np.save("1", keras.ops.convert_to_numpy(loaded(images)))
"""
        )
        for i in range(2):
            found = np.load(os.path.join(folder, f"{i}.npy"))
            self.assert_relative(found, call(model))

    def test_own_models_in_keras_hub(self):
        """In a process of its own: Keras then loads other classes."""
        run_alone(
            f"""
import os
import keras, numpy as np
import keras_hub, keras_moe
from tests.vision.models.tiny import IMAGES, randomize, v_moe
os.chdir({self.get_temp_dir()!r})
dense = randomize(
    keras_moe.models.VMoEImageClassifier(v_moe(moe_layers=[]), 4)
)
model = keras_moe.conversion.upcycle(dense, 4)
model.save_to_preset("model")
model.backbone.save_to_preset("backbone")
wanted = keras.ops.convert_to_numpy(model(IMAGES))
features = keras.ops.convert_to_numpy(model.backbone(IMAGES))
keras_moe.models.register_with_keras_hub()
for _ in range(2):
    loaded = keras_hub.models.ImageClassifier.from_preset("model")
    found = keras.ops.convert_to_numpy(loaded(IMAGES))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    loaded = keras_hub.models.Backbone.from_preset("backbone")
    assert loaded.moe_blocks == [0, 1], loaded.moe_blocks
    loaded = keras_hub.models.ImageClassifier.from_preset(
        "backbone", num_classes=3
    )
    found = keras.ops.convert_to_numpy(loaded.backbone(IMAGES))
    np.testing.assert_allclose(found, features, atol=1e-6)
"""
        )
