from absl.testing import parameterized
from keras import ops

from keras_moe.conversion import resize_positions
from keras_moe.models import MoEImageClassifier
from keras_moe.vision.layers.positions import resized_grid
from tests.test_case import TestCase
from tests.vision.models.tiny import IMAGES
from tests.vision.models.tiny import randomize
from tests.vision.models.tiny import soft_moe
from tests.vision.models.tiny import v_moe


class ResizePositionsTest(TestCase):
    @parameterized.parameters(v_moe, soft_moe)
    def test_backbone(self, make):
        backbone = randomize(make())
        larger = resize_positions(backbone, (12, 8, 3))
        self.assertIs(type(larger), type(backbone))
        tokens = 6 + int(backbone.use_class_token)
        self.assertEqual(larger.output_shape, (None, tokens, 8))
        for old, new in zip(backbone.weights, larger.weights, strict=True):
            old, new = map(ops.convert_to_numpy, (old, new))
            if old.shape == new.shape:
                self.assertAllEqual(old, new)
                continue
            before, after = old[0], new[0]
            if backbone.use_class_token:
                self.assertAllEqual(before[0], after[0])
                before, after = before[1:], after[1:]
            grid = resized_grid(before.reshape(2, 2, 8), 3, 2)
            self.assertAllClose(after, grid.reshape(6, 8))
        same = resize_positions(backbone, (8, 8, 3))
        self.assert_relative(
            same(IMAGES), ops.convert_to_numpy(backbone(IMAGES))
        )

    def test_classifier(self):
        model = randomize(MoEImageClassifier(v_moe(positions="sincos"), 3))
        larger = resize_positions(model, (12, 12, 3))
        for old, new in zip(model.weights, larger.weights, strict=True):
            self.assertAllEqual(*map(ops.convert_to_numpy, (old, new)))
        self.assertEqual(larger.input_shape, (None, 12, 12, 3))
        self.assertEqual(larger.output_shape, (None, 3))

    def test_errors(self):
        backbone = v_moe()
        for model, shape, words in (
            (backbone.block(0), (8, 8, 3), "`model` must be a vision backbone"),
            (backbone, (8, 9, 3), "must divide"),
            (backbone, (8, 8, 1), "as many channels as before"),
            (backbone, (8, 8), "`image_shape` must be three"),
        ):
            with self.assertRaisesRegex(ValueError, words):
                resize_positions(model, shape)
