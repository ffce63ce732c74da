import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import ImageConverter
from keras_moe.models import MoEImageClassifier
from keras_moe.models import SoftMoEBackbone
from keras_moe.models import VMoEBackbone
from keras_moe.models import VMoEImageClassifier
from tests.exported import export
from tests.published.counting import num_weights
from tests.published.models import soft_moe as soft_moe_counts
from tests.published.models import v_moe as v_moe_counts
from tests.test_case import TestCase
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import dtype_of
from tests.vision.models.tiny import randomize
from tests.vision.models.tiny import soft_moe
from tests.vision.models.tiny import v_moe


class ImageClassifierTest(TestCase):
    def test_pooling(self):
        backbone = randomize(v_moe())
        tokens = ops.convert_to_numpy(backbone(IMAGES))
        for pooling, pooled in (
            (None, tokens[:, 0]),
            ("token", tokens[:, 0]),
            ("gap", tokens[:, 1:].mean(1)),  # patches only
        ):
            model = randomize(MoEImageClassifier(backbone, 3, pooling=pooling))
            backbone = randomize(backbone)
            kernel, bias = model.get_layer("predictions").get_weights()
            self.assert_relative(model(IMAGES), pooled @ kernel + bias)
        model = MoEImageClassifier(
            *(backbone, 3),
            pooling="gap",
            activation="softmax",
            representation_dim=5,
        )
        hidden = np.tanh(
            pooled @ model.get_layer("pre_logits").get_weights()[0]
        )
        logits = hidden @ model.get_layer("predictions").get_weights()[0]
        self.assert_relative(
            model(IMAGES), ops.convert_to_numpy(ops.softmax(logits))
        )
        self.assertEqual(
            MoEImageClassifier(soft_moe(), 3).get_config()["pooling"], "gap"
        )

    def test_head_dtype(self):
        backbone = v_moe(dtype="mixed_bfloat16")
        model = MoEImageClassifier(backbone, 3, head_dtype="float32")
        self.assertEqual(dtype_of(model(IMAGES)), "float32")
        again = MoEImageClassifier.from_config(model.get_config())
        self.assertEqual(dtype_of(again(IMAGES)), "float32")
        self.assertEqual(dtype_of(again.backbone(IMAGES)), "bfloat16")
        own = MoEImageClassifier(backbone, 3)
        self.assertEqual(dtype_of(own(IMAGES)), "bfloat16")

    def test_fit_and_save(self):
        """25 tokens in groups of 8: the last one is filled up."""
        backbone = v_moe(group_size=8, drop_policy="priority", drop_path=0.1)
        model = VMoEImageClassifier(backbone, 3, pooling="map", dropout=0.1)
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            # XLA on TensorFlow takes a minute to compile it.
            jit_compile=keras.config.backend() == "jax",
        )
        labels = np.arange(5) % 3
        history = model.fit(IMAGES, labels, epochs=8, verbose=0).history
        self.assertLess(history["loss"][-1], history["loss"][0])
        self.assertIn("routing_dropped_fraction", history)
        path = self.get_temp_dir() + "/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        self.assertIs(type(loaded), VMoEImageClassifier)
        wanted = model.predict(IMAGES, verbose=0)
        self.assert_relative(loaded(IMAGES), wanted)

    def test_exported(self):
        """Groups of tokens do nothing in inference without a capacity."""
        backbone = v_moe(group_size=7, num_layers=1, moe_layers=[0])
        model = randomize(MoEImageClassifier(backbone, 3, pooling="gap"))
        wanted = model.predict(IMAGES, verbose=0)
        served = export(self, model)
        for number in (5, 2):
            outputs = served(IMAGES[:number])
            if isinstance(outputs, (list, tuple)):
                (outputs,) = outputs
            if keras.config.backend() == "torch":
                outputs = outputs.detach()
            self.assert_relative(np.asarray(outputs), wanted[:number])

    @parameterized.named_parameters(
        ("backbone", {"backbone": 3}, "must be a VMoEBackbone"),
        ("another", {"backbone": soft_moe}, "must be a VMoEBackbone"),
        ("classes", {"num_classes": 0}, "`num_classes` must be an int"),
        ("pooling", {"pooling": "avg"}, "`pooling` must be one of"),
        ("activation", {"activation": "x"}, "`activation` must be something"),
        ("dropout", {"dropout": 1}, "`dropout` must be a number"),
        ("width", {"representation_dim": 0}, "`representation_dim` must be"),
    )
    def test_errors(self, arguments, words):
        arguments = {"backbone": v_moe, "num_classes": 3, **arguments}
        if callable(arguments["backbone"]):
            arguments["backbone"] = arguments["backbone"]()
        with self.assertRaisesRegex(ValueError, words):
            VMoEImageClassifier(**arguments)

    def test_no_class_token(self):
        with self.assertRaisesRegex(
            ValueError, "needs a backbone with a class"
        ):
            MoEImageClassifier(soft_moe(), 3, pooling="token")


class PreprocessorTest(TestCase):
    def test_raw_images_of_any_size(self):
        size = v_moe().input_shape[1:3]
        converter = ImageConverter(size, scale=1 / 255, name="converter")
        model = randomize(MoEImageClassifier(v_moe(), 3, converter))
        raw = np.random.default_rng(1).integers(0, 256, (4, 30, 24, 3))
        raw = raw.astype("uint8")
        x = ops.convert_to_numpy(converter(raw))
        plain = MoEImageClassifier(model.backbone, 3)
        plain.layers[-1].set_weights(model.layers[-1].get_weights())
        wanted = ops.convert_to_numpy(plain(x))
        self.assert_relative(model.predict(raw, verbose=0), wanted)
        folder = self.get_temp_dir()
        model.save_to_preset(folder + "/preset")
        model.save(folder + "/model.keras")
        for loaded in (
            MoEImageClassifier.from_preset(folder + "/preset"),
            keras.saving.load_model(folder + "/model.keras"),
        ):
            self.assertEqual(loaded.preprocessor.image_size, list(size))
            self.assert_relative(loaded.predict(raw, verbose=0), wanted)

    def test_errors(self):
        for preprocessor, words in (
            ("resize", "`preprocessor` must be a layer"),
            (ImageConverter((16, 16)), "must make images of shape"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                MoEImageClassifier(v_moe(), 3, preprocessor)


class PresetsTest(TestCase):
    def test_folders(self):
        model = randomize(VMoEImageClassifier(v_moe(), 3, dropout=0.1))
        folder = self.get_temp_dir() + "/new/model"
        model.save_to_preset(folder)
        wanted = ops.convert_to_numpy(model(IMAGES))
        for cls in (VMoEImageClassifier, MoEImageClassifier):
            loaded = cls.from_preset(folder)
            self.assertIs(type(loaded), VMoEImageClassifier)
            self.assert_relative(loaded(IMAGES), wanted)
        random = VMoEImageClassifier.from_preset(folder, load_weights=False)
        difference = ops.convert_to_numpy(random(IMAGES)) - wanted
        self.assertGreater(np.abs(difference).max(), 1e-3)
        # The folder is a preset of the backbone too, for other heads.
        tokens = ops.convert_to_numpy(model.backbone(IMAGES))
        self.assert_relative(VMoEBackbone.from_preset(folder)(IMAGES), tokens)
        other = MoEImageClassifier.from_preset(folder, num_classes=5)
        self.assertEqual(other.output_shape, (None, 5))
        self.assert_relative(other.backbone(IMAGES), tokens)
        with self.assertRaisesRegex(
            ValueError, "is a VMoEBackbone, not a SoftMoEBackbone"
        ):
            SoftMoEBackbone.from_preset(folder)
        for cls in (VMoEBackbone, MoEImageClassifier):
            with self.assertRaisesRegex(
                ValueError,
                r"'v_moe_s32_e8_last_2', .*a folder with config.json",
            ):
                cls.from_preset(folder + "/none")

    def test_classifier_of_a_saved_backbone(self):
        backbone = randomize(soft_moe())
        folder = self.get_temp_dir()
        backbone.save_to_preset(folder)
        model = MoEImageClassifier.from_preset(folder, num_classes=7)
        self.assertEqual(model.output_shape, (None, 7))
        self.assert_relative(
            model.backbone(IMAGES), ops.convert_to_numpy(backbone(IMAGES))
        )
        with self.assertRaisesRegex(ValueError, "SoftMoEBackbone, not a VMoE"):
            VMoEImageClassifier.from_preset(folder, num_classes=7)

    def test_changed(self):
        small = VMoEBackbone.from_preset(
            "v_moe_s32_e8_last_2",
            hidden_dim=8,
            mlp_dim=8,
            image_shape=(32, 32, 3),
        )
        self.assertEqual(small.moe_blocks, [5, 7])
        self.assertEqual(small.output_shape, (None, 2, 8))


def presets_of(presets):
    """All of them on one backend; shapes are the same on the others."""
    names = list(presets)
    return names if keras.config.backend() == "torch" else names[:2]


def counted(make, name):
    """The number of weights, none of which gets values."""
    try:
        with keras.StatelessScope(initialize_variables=False):
            model = make(name)
    finally:
        # Keras would initialize the variables when the next such scope ends.
        keras.utils.clear_session(free_memory=False)
    return num_weights(model.trainable_variables)


class PublishedCountsTest(TestCase):
    """Equal to the published ones: `tests/published` holds its arithmetic,
    which is made of shapes alone, to them."""

    @parameterized.parameters(*presets_of(VMoEBackbone.presets))
    def test_v_moe(self, name):
        _, _, patch, experts, *where = name.split("_")
        size, patch = patch[0].upper(), int(patch[1:])
        layers = {"S": 8, "B": 12, "L": 24, "H": 32}[size]
        blocks = layers // 2 if where[0] == "every" else int(where[1])
        counts = v_moe_counts(size, patch, blocks, int(experts[1:]), head=0)
        self.assertEqual(counted(VMoEBackbone.from_preset, name), counts.total)

    @parameterized.parameters(*presets_of(SoftMoEBackbone.presets))
    def test_soft_moe(self, name):
        *_, size, experts = name.split("_")
        experts = int(experts[1:])
        slots = 2 if (size[0], experts) == ("h", 128) else 1
        counts = soft_moe_counts(
            size[0].upper(), int(size[1:]), experts, slots
        ).total
        # Queries and keys are normalized in each block, with a gain per head.
        heads = {"s": 64, "b": 64, "l": 64, "h": 80}[size[0]]
        layers = {"s": 12, "b": 12, "l": 24, "h": 32}[size[0]]
        self.assertEqual(
            counted(SoftMoEBackbone.from_preset, name),
            counts + 2 * heads * layers,
        )

    def test_with_the_head_of_the_paper(self):
        def make(name):
            backbone = VMoEBackbone.from_preset(name)
            return VMoEImageClassifier(backbone, 18291, representation_dim=512)

        self.assertEqual(counted(make, "v_moe_s32_e32_every_2"), 296_895_347)
