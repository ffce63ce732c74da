"""What tests/vision/models/keras_hub_test.py runs in a process of its own."""

import pathlib
import tempfile
import unittest

import keras
import keras_hub
import numpy as np
from keras_hub.src.tests.test_case import TestCase

import keras_moe

COMMON = {"image_shape": (16, 16, 3), "data_format": "channels_last"}
EXPERTS = {**COMMON, "num_experts": 2}
VIT = {
    **EXPERTS,
    **{"patch_size": 8, "num_layers": 2, "num_heads": 2},
    **{"hidden_dim": 8, "mlp_dim": 12},
}
# Arguments and the shape of the output of two images. The names are how
# keras-hub would write them.
BACKBONES = {
    "VMoEBackbone": (
        {**VIT, "moe_layers": "every_2", "name": "v_mo_e_backbone"},
        (2, 5, 8),
    ),
    "SoftMoEBackbone": ({**VIT, "name": "soft_mo_e_backbone"}, (2, 4, 8)),
    "SwinMoEBackbone": (
        {
            **EXPERTS,
            **{"patch_size": 2, "hidden_dim": 8, "depths": (2, 2)},
            **{"num_heads": (2, 4), "window_size": 4, "mlp_ratio": 1.5},
            "name": "swin_mo_e_backbone",
        },
        (2, 4, 4, 16),
    ),
    "ConvNeXtMoEBackbone": (
        {
            **EXPERTS,
            **{"patch_size": 4, "depths": (2, 2), "hidden_dims": (6, 8)},
            **{"kernel_size": 3, "name": "conv_ne_xt_mo_e_backbone"},
        },
        (2, 2, 2, 8),
    ),
    "MixerMoEBackbone": (
        {
            **EXPERTS,
            **{"patch_size": 8, "num_layers": 2, "hidden_dim": 6},
            **{"token_mlp_dim": 5, "mlp_dim": 7, "moe_layers": [1]},
            "name": "mixer_mo_e_backbone",
        },
        (2, 4, 6),
    ),
    "CondConvBackbone": (
        {
            **COMMON,
            "stages": ["ds_r1_k3_s1_c8", "ir_r2_k3_s2_e2_c12_se0.25_cc3"],
            **{"stem_filters": 8, "head_filters": 10},
            "name": "cond_conv_backbone",
        },
        (2, 4, 4, 10),
    ),
}
OURS = {
    name: getattr(keras_moe.models, name)
    for name in (*BACKBONES, "MoEImageClassifier", "VMoEImageClassifier")
}
IMAGES = np.random.default_rng(0).random((2, 16, 16, 3)).astype("float32")


def weights_of(model):
    return [keras.ops.convert_to_numpy(v) for v in model.weights]


class KerasHubRoutines(TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # Saved before, by the plain classes.
        keras.utils.set_random_seed(0)
        cls.folder = pathlib.Path(tempfile.mkdtemp())
        backbone = OURS["VMoEBackbone"](**BACKBONES["VMoEBackbone"][0])
        converter = keras_moe.layers.ImageConverter((16, 16), scale=1 / 255)
        cls.plain = OURS["VMoEImageClassifier"](backbone, 3, converter)
        cls.plain.save_to_preset(cls.folder / "v_moe")
        backbone = OURS["SoftMoEBackbone"](**BACKBONES["SoftMoEBackbone"][0])
        cls.soft = OURS["MoEImageClassifier"](backbone, 3)
        cls.soft.save_to_preset(cls.folder / "soft_moe")
        cls.soft.save(cls.folder / "soft_moe.keras")
        cls.classes = keras_moe.models.register_with_keras_hub()

    def test_backbones(self):
        for name, (arguments, shape) in BACKBONES.items():
            with self.subTest(name):
                self.run_vision_backbone_test(
                    cls=self.classes[name],
                    init_kwargs=dict(arguments),
                    input_data=IMAGES,
                    expected_output_shape=shape,
                    # Keras quantizes Dense layers; the banks of experts stay.
                    run_quantization_check=False,
                    # It wants one dtype for all layers: routers have float32.
                    run_mixed_precision_check=False,
                    # It takes the axes of tokens for those of images.
                    run_data_format_check=False,
                )

    def test_tasks(self):
        # Of tokens, and of feature maps: what differs is in the backbones.
        for name in ("VMoEBackbone", "ConvNeXtMoEBackbone"):
            arguments, _ = BACKBONES[name]
            classifier = f"{name.removesuffix('Backbone')}ImageClassifier"
            with self.subTest(name):
                self.run_task_test(
                    cls=self.classes[classifier],
                    init_kwargs={
                        "backbone": self.classes[name](**arguments),
                        "num_classes": 3,
                        "preprocessor": (
                            keras_hub.models.ImageClassifierPreprocessor(
                                keras_hub.layers.ImageConverter((16, 16))
                            )
                        ),
                    },
                    train_data=(IMAGES, [0, 2]),
                    expected_output_shape=(2, 3),
                )

    def test_all_are_registered(self):
        for name, ours in OURS.items():
            made = self.classes[name]
            self.assertTrue(issubclass(made, ours))
            registered = keras.saving.get_registered_object(f"keras_moe>{name}")
            self.assertIs(registered, made)
            base = keras_hub.models.Backbone
            if "Classifier" in name:
                base = keras_hub.models.ImageClassifier
            self.assertTrue(issubclass(made, base))
        again = keras_moe.models.register_with_keras_hub()
        self.assertIs(again, self.classes)

    def test_presets_of_plain_models(self):
        for folder, plain in (("v_moe", self.plain), ("soft_moe", self.soft)):
            path = str(self.folder / folder)
            backbone = keras_hub.models.Backbone.from_preset(path)
            self.assertIsInstance(
                backbone, self.classes[type(plain.backbone).__name__]
            )
            self.assertAllClose(backbone(IMAGES), plain.backbone(IMAGES))
            model = keras_hub.models.ImageClassifier.from_preset(path)
            self.assertIsInstance(model, self.classes[type(plain).__name__])
            self.assertAllClose(model.predict(IMAGES), plain.predict(IMAGES))
            other = keras_hub.models.ImageClassifier.from_preset(
                path, num_classes=5
            )
            self.assertEqual(other.output_shape, (None, 5))
            self.assertAllClose(other.backbone(IMAGES), backbone(IMAGES))
        model = keras.saving.load_model(self.folder / "soft_moe.keras")
        self.assertIsInstance(model, keras_hub.models.ImageClassifier)
        self.assertAllClose(model(IMAGES), self.soft(IMAGES))

    def test_a_backbone_alone(self):
        path = str(self.folder / "alone")
        self.soft.backbone.save_to_preset(path)
        model = keras_hub.models.ImageClassifier.from_preset(
            path, num_classes=4
        )
        self.assertIsInstance(model, self.classes["SoftMoEImageClassifier"])
        self.assertAllClose(model.backbone(IMAGES), self.soft.backbone(IMAGES))

    def test_saved_with_a_preprocessor_of_keras_hub(self):
        preprocessor = keras_hub.models.ImageClassifierPreprocessor(
            keras_hub.layers.ImageConverter((16, 16), scale=1 / 255)
        )
        model = self.classes["VMoEImageClassifier"](
            self.classes["VMoEBackbone"](**BACKBONES["VMoEBackbone"][0]),
            *(3, preprocessor),
        )
        raw = (255 * np.random.default_rng(1).random((2, 20, 18, 3))).round()
        path = str(self.folder / "task")
        model.save_to_preset(path)
        loaded = keras_hub.models.ImageClassifier.from_preset(path)
        self.assertIsInstance(
            loaded.preprocessor, keras_hub.models.ImageClassifierPreprocessor
        )
        self.assertAllClose(loaded.predict(raw), model.predict(raw))


if __name__ == "__main__":
    unittest.main()
