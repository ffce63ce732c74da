import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import InvertedResidualBlock
from keras_moe.models import CondConvBackbone
from keras_moe.models import MoEImageClassifier
from keras_moe.routers import DenseRouter
from keras_moe.routers import ExpertChoiceRouter
from tests.test_case import TestCase
from tests.vision.models.backbone_checks import BackboneChecks
from tests.vision.models.image_classifier_test import counted
from tests.vision.models.image_classifier_test import presets_of
from tests.vision.models.tiny import randomize

# Millions of weights with the head of ImageNet-1k, as published.
PUBLISHED = {
    "efficientnet_cc_b0_e4": 13.31,
    "efficientnet_cc_b0_e8": 24.01,
    "efficientnet_cc_b1_e8": 39.72,
}


def cond_conv(**kwargs):
    return CondConvBackbone(
        **{
            "image_shape": (16, 16, 3),
            "stages": ["ds_r1_k3_s1_c8", "ir_r2_k3_s2_e2_c12_se0.25_cc3"],
            "stem_filters": 8,
            "head_filters": 10,
            "data_format": "channels_last",
            **kwargs,
        }
    )


class CondConvBackboneTest(BackboneChecks, TestCase):
    """`tests/vision_cases/condconv_test.py` has a recorded one."""

    make = staticmethod(cond_conv)

    def test_blocks(self):
        backbone = cond_conv(
            stages=[
                ["ds_r1_k5_s2_e1_c16_se0.5"],
                ["ir_r2_k3_s2_e3_c12_cc4", "ir_r1_k3_s1_e6_c20"],
            ]
        )
        self.assertEqual(backbone.moe_blocks, [1, 2])
        found = [
            (b.filters, b.kernel_size, b.strides, b.expansion, b.num_experts)
            for b in map(backbone.block, range(4))
        ]
        self.assertEqual(
            found,
            [
                (16, 5, 2, None, None),
                (12, 3, 2, 3.0, 4),
                (12, 3, 1, 3.0, 4),
                (20, 3, 1, 6.0, None),
            ],
        )
        self.assertEqual(backbone.block(0).squeeze.units, 4)
        self.assertIsNone(backbone.block(1).squeeze)
        # 12 * 3 = 36 and 12 * 6 = 72, in multiples of 8.
        self.assertEqual(backbone.block(2).expand_norm.gamma.shape[0], 40)
        self.assertEqual(backbone.block(3).expand_norm.gamma.shape[0], 72)

    def test_dense_twin_is_that_of_keras(self):
        """`keras.applications.EfficientNetB0`, its weights in their order."""
        if keras.config.backend() != "torch":
            self.skipTest("large; a tiny one is recorded")
        theirs = keras.applications.EfficientNetB0(
            weights=None, input_shape=(64, 64, 3), classes=5
        )
        stages = [
            stage.removesuffix("_cc4")
            for stage in CondConvBackbone(image_shape=(64, 64, 3)).get_config()[
                "stages"
            ]
        ]
        model = MoEImageClassifier(
            CondConvBackbone((64, 64, 3), stages, data_format="channels_last"),
            5,
            activation="softmax",
        )
        self.assertEqual(model.backbone.moe_blocks, [])
        rng = np.random.default_rng(0)
        values = []
        for variable in theirs.weights:
            if variable.name == "moving_variance" or "normal" in variable.path:
                continue
            noise = rng.normal(size=variable.shape) * 0.1
            variable.assign(ops.convert_to_numpy(variable) + noise)
        for layer in theirs.layers:
            if not layer.name.startswith("normalization"):
                values += layer.get_weights()
        backbone, ours = model.backbone, []
        for name in ("stem", "stem_norm"):
            ours += backbone.get_layer(name).weights
        for i in range(16):
            block = backbone.block(i)
            for name in (
                *("expand", "expand_norm", "depthwise", "depthwise_norm"),
                *("squeeze", "excite", "project", "project_norm"),
            ):
                part = getattr(block, name)
                ours += part.weights if part is not None else []
        for name in ("head", "head_norm"):
            ours += backbone.get_layer(name).weights
        ours += model.get_layer("predictions").weights
        for variable, value in zip(ours, values, strict=True):
            variable.assign(value.reshape(variable.shape))
        images = rng.normal(size=(2, 64, 64, 3)).astype("float32")
        self.assert_relative(
            model(images), ops.convert_to_numpy(theirs(255 * images)), 1e-4
        )

    def test_a_router_for_each_block(self):
        """A dynamic convolution, whose weights are a softmax."""
        router = DenseRouter(3, temperature=30.0)
        backbone = randomize(cond_conv(router=router))
        first, second = (backbone.block(i).router for i in (1, 2))
        self.assertIsNot(first, second)
        self.assertIsNot(first, router)
        self.assertEqual(first.temperature, 30.0)
        block = backbone.block(1)
        x = np.random.default_rng(0).normal(size=(2, 4, 4, 8))
        weights = ops.convert_to_numpy(block.routing_weights(x))
        self.assertAllClose(weights.sum(1), [1.0, 1.0])
        again = CondConvBackbone.from_config(backbone.get_config())
        self.assertEqual(again.block(2).router.temperature, 30.0)

    @parameterized.named_parameters(
        ("same", {"drop_path": 0.1}),
        ("symmetric", {"padding": "symmetric", "activation": "relu6"}),
    )
    def test_saved(self, options):
        backbone = self.check_saved(**options)
        self.assertEqual(backbone.output_shape, (None, 4, 4, 10))

    def test_channels_first(self):
        self.check_channels_first()

    def test_half_precision(self):
        self.check_half_precision()

    def test_exported(self):
        self.check_exported(stages=["ir_r1_k3_s2_e2_c12_se0.25_cc3"])

    def test_fit(self):
        self.check_fit(drop_path=0.1, batch_norm_momentum=0.5)

    @parameterized.named_parameters(
        ("stages", {"stages": "ir_r1"}, "`stages` must be a list of strings"),
        ("none", {"stages": []}, "`stages` must be a list of strings"),
        ("kind", {"stages": ["er_r1_k3_s1_c8"]}, "begin with 'ir' or 'ds'"),
        ("number", {"stages": [3]}, "begin with 'ir' or 'ds'"),
        ("option", {"stages": ["ds_r1_k3_s1_c8_x3"]}, "'x3' is not known"),
        ("twice", {"stages": ["ds_r1_k3_s1_c8_c8"]}, "or there twice"),
        ("lacks", {"stages": ["ds_r1_k3_s1"]}, "there is no filters"),
        ("expansion", {"stages": ["ir_r1_k3_s1_c8"]}, "there is no expansion"),
        ("of_ds", {"stages": ["ds_r1_k3_s1_c8_e2"]}, "has no expansion"),
        ("int", {"stages": ["ds_r1.5_k3_s1_c8"]}, "'r1.5' must be an int"),
        ("zero", {"stages": ["ds_r0_k3_s1_c8"]}, "'r0' must be positive"),
        ("stem", {"stem_filters": 0}, "`stem_filters` must be an int"),
        ("padding", {"padding": "valid"}, "`padding` must be one of"),
        ("epsilon", {"batch_norm_epsilon": 0}, "`batch_norm_epsilon` must be"),
        ("activation", {"activation": "x"}, "`activation` must be something"),
        ("router", {"router": DenseRouter(2)}, "number of the router"),
        ("together", {"router": ExpertChoiceRouter(3)}, "decides for"),
        ("drop_path", {"drop_path": 1}, "`drop_path` must be a number"),
        ("format", {"data_format": "x"}, "`data_format` must be one of"),
    )
    def test_errors(self, arguments, words):
        self.check_errors(arguments, words)

    def test_errors_of_a_block(self):
        for arguments, words in (
            ({"filters": 0}, "`filters` must be an int"),
            ({"expansion": 0}, "`expansion` must be positive"),
            ({"squeeze_ratio": -1}, "`squeeze_ratio` must be"),
            ({"router": DenseRouter(2)}, "`router` needs `num_experts`"),
            ({"num_experts": 0}, "`num_experts` must be an int"),
            ({"strides": 1.5}, "`strides` must be an int"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                InvertedResidualBlock(**{"filters": 8, **arguments})
        with self.assertRaisesRegex(ValueError, "static channels"):
            InvertedResidualBlock(8).build((None, 8, 8))


class PublishedCountsTest(TestCase):
    @parameterized.parameters(*presets_of(PUBLISHED))
    def test_weights(self, name):
        def make(name):
            backbone = CondConvBackbone.from_preset(name)
            return MoEImageClassifier(backbone, 1000)

        self.assertEqual(round(counted(make, name) / 1e6, 2), PUBLISHED[name])

    def test_all_are_counted(self):
        self.assertEqual(set(PUBLISHED), set(CondConvBackbone.presets))
