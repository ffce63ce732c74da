from unittest import mock

from absl.testing import parameterized
from keras import ops

from keras_moe.conversion import resize_positions
from keras_moe.layers import MoE
from keras_moe.models import MoEImageClassifier
from keras_moe.models import SwinMoEBackbone
from keras_moe.routers import CosineRouter
from keras_moe.routers import TaskRouter
from tests.test_case import TestCase
from tests.vision.models.backbone_checks import BackboneChecks
from tests.vision.models.image_classifier_test import counted
from tests.vision.models.image_classifier_test import presets_of
from tests.vision.models.tiny import randomize

TASKS = TaskRouter(3, num_tasks=2, top_k=1)
# Millions of weights with the head of ImageNet-22k, as published.
PUBLISHED = {
    "s_dense": 65.8,
    "s_e8": 173,
    "s_e16": 296,
    "s_e32": 542,
    "s_e64": 1033,
    "b_dense": 109.3,
    "b_e8": 300,
    "b_e16": 519,
    "b_e32": 955,
}


def swin_moe(**kwargs):
    return SwinMoEBackbone(
        **{
            "image_shape": (16, 16, 3),
            "patch_size": 2,
            "hidden_dim": 8,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "window_size": 3,
            "mlp_ratio": 1.5,
            "num_experts": 3,
            "data_format": "channels_last",
            **kwargs,
        }
    )


class SwinMoEBackboneTest(BackboneChecks, TestCase):
    make = staticmethod(swin_moe)

    @parameterized.parameters(
        (None, (2, 2, 4, 2), [5, 7, 9]),
        (None, (3, 2, 3), [4, 6]),
        ("last_2", (2, 2, 4, 2), [7, 9]),
        ("every_2", (2, 2), [1, 3]),
        ([3, 0], (2, 2), [0, 3]),
        ((), (1, 1), []),
    )
    def test_blocks(self, moe_layers, depths, wanted):
        backbone = swin_moe(
            moe_layers=moe_layers,
            depths=depths,
            num_heads=2,
            image_shape=(32, 32, 3),
            num_experts=[2 + i for i in range(len(wanted))],
        )
        self.assertEqual(backbone.moe_blocks, wanted)
        widths = [8 * 2**s for s, d in enumerate(depths) for _ in range(d)]
        for i, block in enumerate(wanted):
            layer = backbone.block(block).feed_forward
            self.assertEqual(layer.num_experts, 2 + i)
            self.assertEqual(
                layer.experts.intermediate_dim, widths[block] * 3 // 2
            )

    def test_as_in_the_paper(self):
        layer = swin_moe().block(1).feed_forward
        self.assertEqual(
            (layer.router.top_k, layer.capacity.rule), (1, "tutel")
        )
        self.assertEqual(layer.capacity.capacity_factor, 1.25)
        self.assertEqual(layer.capacity.drop_policy, "priority")
        self.assertFalse(layer.capacity.limits(training=False))
        self.assertEqual(
            [(type(x).__name__, x.weight) for x in layer.routing_losses],
            [("ImportanceLoss", 5e-3), ("LoadLoss", 5e-3)],
        )
        layer = swin_moe(router="swin_moe_cosine").block(1).feed_forward
        self.assertIsInstance(layer.router, CosineRouter)
        self.assertLen(layer.routing_losses, 2)

    @parameterized.named_parameters(
        ("windows", {"drop_path": 0.1, "positions": "sincos"}),
        (
            "options",
            {
                "use_output_bias": False,
                "use_qkv_bias": False,
                "patch_norm": False,
                "pretrained_window_size": (4, 0),
                "router": "swin_moe_cosine",
                "top_k": 2,
                "normalize_weights": True,
                "num_shared_experts": 1,
                "group_size": "image",
            },
        ),
    )
    def test_saved(self, options):
        backbone = self.check_saved(**options)
        self.assertEqual(backbone.output_shape, (None, 4, 4, 16))

    def test_channels_first(self):
        self.check_channels_first(depths=(1, 2))

    def test_half_precision(self):
        self.check_half_precision(depths=(2,), num_heads=2)

    def test_exported(self):
        self.check_exported(depths=(2,), num_heads=2)

    def test_classifier_of_a_preset(self):
        def make(name):
            return MoEImageClassifier.from_preset(
                name, num_classes=5, pooling="gap"
            )

        head = 5 * (768 + 1)
        backbone = counted(SwinMoEBackbone.from_preset, "swin_moe_s_e8")
        self.assertEqual(counted(make, "swin_moe_s_e8"), backbone + head)

    def test_fit(self):
        logs = self.check_fit(
            everywhere=True,
            depths=(1, 2),
            dropout=0.1,
            attention_dropout=0.1,
            drop_path=0.1,
        )
        self.assertIn("routing_dropped_fraction", logs)

    def test_what_fills_windows_up_is_not_routed(self):
        """8 x 8 tokens, and 4 x 4, in windows of 3."""
        backbone = swin_moe()
        seen = []
        routed = MoE._routed

        def spy(layer, tokens, *args):
            seen.append(len(tokens.rows))
            return routed(layer, tokens, *args)

        with mock.patch.object(MoE, "_routed", spy):
            backbone(self.images(2))
        self.assertEqual(seen, [2 * 64, 2 * 16])

    def test_resized(self):
        backbone = randomize(swin_moe(positions="learned"))
        model = randomize(MoEImageClassifier(backbone, 3))
        larger = resize_positions(model, (28, 32, 3))
        self.assertEqual(larger.backbone.output_shape, (None, 7, 8, 16))
        for old, new in zip(
            backbone.weights, larger.backbone.weights, strict=True
        ):
            if old.path != "patch_embedding/positions":
                self.assertAllEqual(old, new)
        same = resize_positions(model, (16, 16, 3))
        self.assert_relative(
            same(self.images()), ops.convert_to_numpy(model(self.images()))
        )

    def test_map_pooling(self):
        with self.assertRaisesRegex(ValueError, "attention over all tokens"):
            MoEImageClassifier(swin_moe(), 3, pooling="map")

    @parameterized.named_parameters(
        ("sizes", {"image_shape": (16, 15, 3)}, r"must divide .* \(16, 15\)"),
        ("odd", {"image_shape": (16, 14, 3)}, "must be two even ints"),
        ("shape", {"image_shape": (8, 8)}, "`image_shape` must be three"),
        ("depths", {"depths": (2, 0)}, "`depths` must be a list of positive"),
        ("depth", {"depths": 2}, "`depths` must be a list of positive ints"),
        ("heads", {"num_heads": (2,)}, "`num_heads` must be .* a list of 2"),
        ("divide", {"num_heads": 3}, "`num_heads` must divide the width of"),
        ("window", {"window_size": 0}, "`window_size` must be an int"),
        ("ratio", {"mlp_ratio": -1}, "`mlp_ratio` must be"),
        ("width", {"mlp_ratio": 0.01}, "`mlp_ratio` must be"),
        ("beyond", {"moe_layers": [4]}, "Received: moe_layers=.4."),
        ("last", {"moe_layers": "last_3"}, "with n from 1 to 2"),
        ("no_odd", {"depths": (1, 1)}, "`moe_layers` must be given where"),
        ("norm", {"patch_norm": 3}, "`patch_norm` must be True or False"),
        ("bias", {"use_output_bias": None}, "`use_output_bias` must be"),
        ("measured", {"pretrained_window_size": -1}, "`pretrained_window_siz"),
        ("router", {"router": "unheard"}, "`router` must be one of"),
        ("group", {"group_size": 0}, "`group_size` must be an int"),
        ("shared", {"num_shared_experts": -1}, "`num_shared_experts` must be"),
        ("context", {"router": TASKS}, "must not need a context"),
    )
    def test_errors(self, arguments, words):
        self.check_errors(arguments, words)

    def test_unknown_argument(self):
        with self.assertRaisesRegex(TypeError, "unheard"):
            swin_moe(unheard=1)


class PublishedCountsTest(TestCase):
    def counted(self, name, head=21841):
        def make(name):
            backbone = SwinMoEBackbone.from_preset(name)
            return MoEImageClassifier(backbone, head)

        return counted(make, f"swin_moe_{name}")

    @parameterized.parameters(*presets_of(PUBLISHED))
    def test_published(self, name):
        wanted = PUBLISHED[name]
        digits = 1 if isinstance(wanted, float) else 0
        self.assertEqual(round(self.counted(name) / 1e6, digits), wanted)

    def test_others(self):
        """The same but for the number of experts, or the router."""
        few, more = self.counted("s_e32"), self.counted("s_e64")
        self.assertEqual(self.counted("s_e128"), more + 2 * (more - few))
        widths = [384] * 9 + [768]
        routers = sum(
            256 * width + 256 + 256 * 32 + 1 - 32 * width for width in widths
        )
        self.assertEqual(self.counted("s_e32_cosine"), few + routers)
        self.assertEqual(self.counted("b_e32_top2"), self.counted("b_e32"))
        left = {"s_e128", "s_e32_cosine", "b_e32_top2", "b_e32_cosine"}
        self.assertEqual(
            {f"swin_moe_{name}" for name in {*PUBLISHED, *left}},
            set(SwinMoEBackbone.presets),
        )
