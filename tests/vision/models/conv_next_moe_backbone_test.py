import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.conversion import resize_positions
from keras_moe.layers import ConvNeXtBlock
from keras_moe.models import ConvNeXtMoEBackbone
from keras_moe.models import MoEImageClassifier
from tests import token_loop
from tests.test_case import TestCase
from tests.vision.models.backbone_checks import BackboneChecks
from tests.vision.models.image_classifier_test import counted
from tests.vision.models.image_classifier_test import presets_of
from tests.vision.models.numpy_layers import convolved
from tests.vision.models.numpy_layers import mlp
from tests.vision.models.numpy_layers import normalized
from tests.vision.models.numpy_layers import patches
from tests.vision.models.numpy_layers import under
from tests.vision.models.tiny import randomize

# With the head of ImageNet-1k, as published.
PUBLISHED = {
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
    "convnext_xlarge": 350_196_968,
}


def conv_next(**kwargs):
    return ConvNeXtMoEBackbone(
        **{
            "image_shape": (16, 16, 3),
            "patch_size": 4,
            "depths": (2, 2),
            "hidden_dims": (6, 8),
            "kernel_size": 3,
            "mlp_ratio": 1.5,
            "num_experts": 3,
            "activation": "tanh",
            "layer_scale": 1.0,
            "data_format": "channels_last",
            **kwargs,
        }
    )


def by_hand(images, weights, top_k):
    """The feature map of `conv_next()`, and the mean that is classified."""
    x = patches(images, 4) @ weights["patch_embedding/projection/kernel"]
    x = x + weights["patch_embedding/projection/bias"]
    x = normalized(x, under(weights, "patch_embedding/norm/"), 1e-6)
    for i in range(4):
        if i == 2:
            x = normalized(x, under(weights, "downsampling_1_norm/"), 1e-6)
            w = under(weights, "downsampling_1/")
            x = patches(x, 2) @ w["kernel"].reshape(-1, 8) + w["bias"]
        w = under(weights, f"block_{i}/")
        y = convolved(x, w["depthwise/kernel"][..., 0])
        y = y + w["depthwise/bias"]
        y = normalized(y, under(w, "norm/"), 1e-6)
        tokens = y.reshape(-1, y.shape[-1])
        if i % 2:
            of_moe = under(w, "moe/")
            y, *_ = token_loop.moe(tokens, of_moe, top_k, "tanh", norm=False)
        else:
            y = mlp(tokens, under(w, "mlp/"))
        x = x + w["scale"] * y.reshape(x.shape)
    return x


class ConvNeXtMoEBackboneTest(BackboneChecks, TestCase):
    make = staticmethod(conv_next)

    def weights_of(self, model):
        return {
            v.path: ops.convert_to_numpy(v).astype("float64")
            for v in model.trainable_variables
        }

    @parameterized.parameters(1, 2)
    def test_by_hand(self, top_k):
        backbone = randomize(conv_next(top_k=top_k))
        self.assertEqual(backbone.moe_blocks, [1, 3])
        images = self.images(2)
        weights = self.weights_of(backbone)
        wanted = by_hand(images, weights, top_k)
        cotangent = np.random.default_rng(1).normal(size=wanted.shape)
        outputs, d_images, d_weights = self.outputs_and_gradients(
            backbone, images, cotangent, whole_paths=True
        )
        self.assert_relative(outputs, wanted)
        some = {
            name: weights[name]
            for name in (
                "block_1/depthwise/bias",
                "block_1/scale",
                "block_1/moe/router/kernel",
                "block_3/moe/experts/down_bias",
                "downsampling_1/bias",
            )
        }
        gradients = token_loop.gradients(
            lambda parts: np.sum(
                by_hand(images, {**weights, **parts}, top_k) * cotangent
            ),
            some,
        )
        for name, gradient in gradients.items():
            scale = np.abs(gradient).max()
            self.assertGreater(scale, 1e-3)
            self.assert_relative(
                d_weights[name] / scale, gradient / scale, 1e-4
            )
        self.assertGreater(np.abs(d_images).max(), 0)

    def test_classifier(self):
        """The mean of the map is normalized."""
        model = randomize(MoEImageClassifier(conv_next(), 3))
        images, weights = self.images(2), self.weights_of(model)
        mean = by_hand(images, weights, 2).mean((1, 2))
        mean = normalized(mean, under(weights, "pooled_norm/"), 1e-6)
        head = under(weights, "predictions/")
        self.assert_relative(
            model(images), mean @ head["kernel"] + head["bias"]
        )

    def test_dense_twin_is_that_of_keras(self):
        """`keras.applications.ConvNeXtTiny`, its weights in their order."""
        if keras.config.backend() != "torch":
            self.skipTest("large; a tiny one is computed by hand")
        theirs = keras.applications.ConvNeXtTiny(
            include_preprocessing=False,
            weights=None,
            input_shape=(32, 32, 3),
            include_top=False,
            pooling="avg",
        )
        ours = ConvNeXtMoEBackbone.from_preset(
            "convnext_tiny", image_shape=(32, 32, 3)
        )
        model = MoEImageClassifier(ours, 2)
        values = theirs.get_weights()
        rng = np.random.default_rng(0)
        values = [v + rng.normal(size=v.shape) * 0.1 for v in values]
        theirs.set_weights(values)
        for layer in theirs.layers:
            name = layer.name
            words = name.removeprefix("convnext_tiny_").split("_")
            if words[0] == "stage":
                stage, number = int(words[1]), int(words[3])
                block = ours.block(sum((3, 3, 9, 3)[:stage]) + number)
                parts = {
                    "depthwise_conv": block.depthwise,
                    "layernorm": block.norm,
                    "pointwise_conv_1": block.feed_forward.dense_1,
                    "pointwise_conv_2": block.feed_forward.dense_2,
                }
                kind = "_".join(words[4:])
                if kind == "layer_scale":
                    block.scale.assign(layer.gamma)
                if kind in parts:
                    self.fill(parts[kind], layer)
            elif words[-1] == "stem":
                stem = ours.get_layer("patch_embedding")
                self.fill(stem.projection, layer.layers[0])
                self.fill(stem.norm, layer.layers[1])
            elif words[0] == "downsampling":
                stage = int(words[-1]) + 1
                norm = ours.get_layer(f"downsampling_{stage}_norm")
                self.fill(norm, layer.layers[0])
                self.fill(
                    ours.get_layer(f"downsampling_{stage}"), layer.layers[1]
                )
        self.fill(model.get_layer("pooled_norm"), theirs.layers[-1])
        images = rng.normal(size=(2, 32, 32, 3)).astype("float32")
        found = model.get_layer("pooled_norm")(
            ops.mean(ours(images), axis=(1, 2))
        )
        self.assert_relative(found, ops.convert_to_numpy(theirs(images)), 1e-4)

    def fill(self, layer, theirs):
        for variable, value in zip(
            layer.weights, theirs.get_weights(), strict=True
        ):
            variable.assign(value.reshape(variable.shape))

    @parameterized.named_parameters(
        ("groups", {"group_size": 7, "drop_path": 0.1, "layer_scale": None}),
        ("images", {"group_size": "image", "route_per": "image"}),
    )
    def test_saved(self, options):
        backbone = self.check_saved(**options)
        self.assertEqual(backbone.output_shape, (None, 2, 2, 8))

    def test_channels_first(self):
        self.check_channels_first()

    def test_half_precision(self):
        self.check_half_precision()

    def test_exported(self):
        self.check_exported(depths=(1,), hidden_dims=(6,), moe_layers=[0])

    def test_fit(self):
        logs = self.check_fit(drop_path=0.1, group_size=9)
        self.assertIn("routing_dropped_fraction", logs)

    def test_resized(self):
        backbone = randomize(conv_next())
        larger = resize_positions(backbone, (24, 40, 3))
        self.assertEqual(larger.output_shape, (None, 3, 5, 8))
        for old, new in zip(backbone.weights, larger.weights, strict=True):
            self.assertAllEqual(old, new)

    @parameterized.named_parameters(
        ("sizes", {"image_shape": (16, 18, 3)}, r"must divide .* \(16, 18\)"),
        ("odd", {"image_shape": (16, 12, 3)}, "feature map of even height"),
        ("depths", {"depths": ()}, "`depths` must be a list of positive"),
        ("dims", {"hidden_dims": (4,)}, "a width for each stage"),
        ("width", {"hidden_dims": (4, 0)}, "`hidden_dims` must be a positive"),
        ("kernel", {"kernel_size": 0}, "`kernel_size` must be an int"),
        ("ratio", {"mlp_ratio": 0.1}, "`mlp_ratio` must be"),
        ("last", {"moe_layers": "last_3"}, "with n from 1 to 2"),
        ("scale", {"layer_scale": 0}, "`layer_scale` must be positive"),
        ("drop", {"drop_path": 1}, "`drop_path` must be a number"),
        ("activation", {"activation": "x"}, "`activation` must be something"),
        ("per", {"route_per": "x"}, "`route_per` must be one of"),
        ("list", {"num_experts": [3]}, "each of the 2 blocks"),
    )
    def test_errors(self, arguments, words):
        self.check_errors(arguments, words)

    def test_errors_of_a_block(self):
        with self.assertRaisesRegex(ValueError, "must be a layer"):
            ConvNeXtBlock(None)
        with self.assertRaisesRegex(ValueError, "static channels"):
            ConvNeXtBlock(keras.layers.Dense(4)).build((None, 5, 4))


class PublishedCountsTest(TestCase):
    @parameterized.parameters(*presets_of(PUBLISHED))
    def test_weights(self, name):
        def make(name):
            backbone = ConvNeXtMoEBackbone.from_preset(name)
            return MoEImageClassifier(backbone, 1000)

        self.assertEqual(counted(make, name), PUBLISHED[name])

    def test_all_are_counted(self):
        self.assertEqual(set(PUBLISHED), set(ConvNeXtMoEBackbone.presets))
