import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.conversion import resize_positions
from keras_moe.models import MixerMoEBackbone
from keras_moe.models import MoEImageClassifier
from tests import token_loop
from tests.test_case import TestCase
from tests.vision.models.backbone_checks import BackboneChecks
from tests.vision.models.image_classifier_test import counted
from tests.vision.models.image_classifier_test import presets_of
from tests.vision.models.numpy_layers import mlp
from tests.vision.models.numpy_layers import normalized
from tests.vision.models.numpy_layers import patches
from tests.vision.models.numpy_layers import under
from tests.vision.models.tiny import randomize

# Millions of weights without a head, as published.
PUBLISHED = {
    "mixer_s32": 19,
    "mixer_s16": 18,
    "mixer_b32": 60,
    "mixer_b16": 59,
    "mixer_l32": 206,
    "mixer_l16": 207,
    "mixer_h14": 431,
}


def mixer(**kwargs):
    return MixerMoEBackbone(
        **{
            "image_shape": (16, 16, 3),
            "patch_size": 8,
            "num_layers": 3,
            "hidden_dim": 6,
            "token_mlp_dim": 5,
            "mlp_dim": 7,
            "num_experts": 3,
            "moe_layers": [1],
            "token_moe_layers": [1, 2],
            "activation": "tanh",
            "data_format": "channels_last",
            **kwargs,
        }
    )


def by_hand(images, weights):
    """What `mixer()` gives."""
    x = patches(images, 8).reshape(len(images), 4, -1)
    w = under(weights, "patch_embedding/projection/")
    x = x @ w["kernel"] + w["bias"]
    for i in range(3):
        w = under(weights, f"block_{i}/")
        y = normalized(x, under(w, "attention_norm/"), 1e-6)
        y = y.transpose(0, 2, 1)
        y = fed_forward(y, under(w, "token_mixing/"), i in (1, 2))
        x = x + y.transpose(0, 2, 1)
        y = normalized(x, under(w, "feed_forward_norm/"), 1e-6)
        x = x + fed_forward(y, w, i == 1)
    return normalized(x, under(weights, "norm/"), 1e-6)


def fed_forward(x, weights, has_experts):
    if not has_experts:
        return mlp(x, under(weights, "mlp/"))
    rows = x.reshape(-1, x.shape[-1])
    y, *_ = token_loop.moe(rows, under(weights, "moe/"), 2, "tanh", norm=False)
    return y.reshape(x.shape)


class MixerMoEBackboneTest(BackboneChecks, TestCase):
    make = staticmethod(mixer)

    def test_by_hand(self):
        backbone = randomize(mixer())
        self.assertEqual(backbone.moe_blocks, [1])
        self.assertEqual(backbone.token_moe_blocks, [1, 2])
        images = self.images(2)
        weights = {
            v.path: ops.convert_to_numpy(v).astype("float64")
            for v in backbone.trainable_variables
        }
        wanted = by_hand(images, weights)
        cotangent = np.random.default_rng(1).normal(size=wanted.shape)
        outputs, _, d_weights = self.outputs_and_gradients(
            backbone, images, cotangent, whole_paths=True
        )
        self.assert_relative(outputs, wanted)
        some = {
            name: weights[name]
            for name in (
                "block_1/token_mixing/moe/router/kernel",
                "block_2/token_mixing/moe/experts/up_bias",
                "block_1/moe/router/kernel",
                "block_0/token_mixing/mlp/dense_1/bias",
            )
        }
        gradients = token_loop.gradients(
            lambda parts: np.sum(
                by_hand(images, {**weights, **parts}) * cotangent
            ),
            some,
        )
        for name, gradient in gradients.items():
            scale = np.abs(gradient).max()
            self.assertGreater(scale, 1e-3)
            self.assert_relative(
                d_weights[name] / scale, gradient / scale, 1e-4
            )

    def test_widths(self):
        backbone = mixer(num_layers=4, moe_layers="last_2")
        self.assertEqual(backbone.moe_blocks, [1, 3])
        block = backbone.block(1)
        self.assertEqual(block.feed_forward.experts.intermediate_dim, 7)
        mixing = block.token_mixer.feed_forward
        self.assertEqual(mixing.experts.intermediate_dim, 5)

    @parameterized.named_parameters(
        ("images", {"group_size": "image", "drop_path": 0.1}),
        ("by_image", {"route_per": "image", "dropout": 0.1}),
        ("groups", {"group_size": 3, "token_moe_layers": ()}),
    )
    def test_saved(self, options):
        self.check_saved(**options)

    def test_channels_first(self):
        self.check_channels_first()

    def test_half_precision(self):
        self.check_half_precision()

    def test_exported(self):
        self.check_exported(num_layers=1, moe_layers=[0], token_moe_layers=[0])

    def test_fit(self):
        self.check_fit(drop_path=0.1, dropout=0.1)

    def test_not_resized(self):
        with self.assertRaisesRegex(ValueError, "images of one size alone"):
            resize_positions(mixer(), (24, 16, 3))

    @parameterized.named_parameters(
        ("sizes", {"image_shape": (16, 18, 3)}, r"must divide .* \(16, 18\)"),
        ("layers", {"num_layers": 0}, "`num_layers` must be an int"),
        ("tokens", {"token_mlp_dim": 0}, "`token_mlp_dim` must be an int"),
        ("channels", {"mlp_dim": 0.5}, "`mlp_dim` must be an int"),
        ("where", {"token_moe_layers": [3]}, "`token_moe_layers` must be"),
        ("group", {"group_size": 4}, "`group_size` must be None or 'image'"),
        ("dropout", {"dropout": 1}, "`dropout` must be a number"),
        ("list", {"num_experts": [3]}, "each of the 2 blocks"),
    )
    def test_errors(self, arguments, words):
        self.check_errors(arguments, words)


class PublishedCountsTest(TestCase):
    @parameterized.parameters(*presets_of(PUBLISHED))
    def test_weights(self, name):
        number = counted(MixerMoEBackbone.from_preset, name)
        self.assertEqual(round(number / 1e6), PUBLISHED[name])

    def test_with_experts(self):
        """Two blocks of B/16 with 8 experts each, in the place of one."""
        model = MoEImageClassifier(mixer(token_moe_layers=()), 2)
        self.assertEqual(model.output_shape, (None, 2))

        def make(name):
            return MixerMoEBackbone.from_preset(name, moe_layers="last_2")

        dense = counted(MixerMoEBackbone.from_preset, "mixer_b16")
        one = 2 * 768 * 3072 + 768 + 3072
        self.assertEqual(
            counted(make, "mixer_b16"), dense + 2 * (7 * one + 8 * 768)
        )

    def test_all_are_counted(self):
        self.assertEqual(set(PUBLISHED), set(MixerMoEBackbone.presets))
