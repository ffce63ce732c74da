import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

from keras_moe.layers import ImageConverter
from tests.test_case import TestCase


class ImageConverterTest(TestCase):
    def test_standard_layer(self):
        self.run_layer_test(
            ImageConverter,
            init_kwargs={"image_size": (4, 5), "scale": 0.5, "offset": -1.0},
            input_shape=(2, 6, 8, 3),
            expected_output_shape=(2, 4, 5, 3),
            expected_num_trainable_weights=0,
            expected_num_losses=0,
            run_training_check=False,
        )

    @parameterized.parameters("channels_last", "channels_first")
    def test_numbers_by_channel(self, data_format):
        images = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3).astype("uint8")
        scale, offset = [1.0, 2.0, 3.0], [0.0, -1.0, 0.5]
        wanted = images * np.array(scale) + offset
        first = data_format == "channels_first"
        if first:
            images, wanted = (
                np.transpose(x, (0, 3, 1, 2)) for x in (images, wanted)
            )
        layer = ImageConverter(None, scale, offset, data_format=data_format)
        self.assertAllClose(layer(images), wanted)
        self.assertEqual(
            layer.compute_output_shape((None, 3, 8, 8)), (None, 3, 8, 8)
        )

    @parameterized.parameters("channels_last", "channels_first")
    def test_resizing(self, data_format):
        # 4 x 6 images whose middle 4 x 4 are averaged by two.
        images = np.zeros((1, 4, 6, 1), "float32")
        images[0, :, 1:5, 0] = np.arange(16).reshape(4, 4)
        cropped = [[[2.5], [4.5]], [[10.5], [12.5]]]
        stretched = ops.image.resize(
            images, (2, 2), data_format="channels_last"
        )
        for crop, wanted in ((True, [cropped]), (False, stretched)):
            wanted = np.array(wanted)
            x = images
            if data_format == "channels_first":
                wanted, x = (np.transpose(v, (0, 3, 1, 2)) for v in (wanted, x))
            layer = ImageConverter(
                (2, 2), crop_to_aspect_ratio=crop, data_format=data_format
            )
            self.assertAllClose(layer(x), wanted, atol=1e-5)

    def test_in_a_model_of_any_size(self):
        x = keras.Input((None, None, 3), dtype="uint8")
        layer = ImageConverter((8, 8), scale=1 / 255, dtype="mixed_bfloat16")
        model = keras.Model(x, layer(x))
        self.assertEqual(model.output_shape, (None, 8, 8, 3))
        for size in ((9, 12), (8, 8)):
            y = model.predict(np.full((2, *size, 3), 255, "uint8"), verbose=0)
            self.assertAllClose(y, np.ones((2, 8, 8, 3)), atol=1e-2)

    def test_errors(self):
        for kwargs, message in (
            ({"image_size": 8.5}, "`image_size`"),
            ({"image_size": (8, 0)}, "`image_size`"),
            ({"scale": "a"}, "`scale`"),
            ({"offset": [1.0, None]}, "`offset`"),
            ({"pad_to_aspect_ratio": True}, "`pad_to_aspect_ratio=True` needs"),
            ({"interpolation": "cubic"}, "`interpolation` must be"),
            ({"data_format": "last"}, "`data_format` must be"),
        ):
            with (
                self.subTest(message),
                self.assertRaisesRegex(ValueError, message),
            ):
                ImageConverter(**kwargs)
        with self.assertRaisesRegex(ValueError, "a number for each of the 3"):
            ImageConverter(scale=[1.0, 2.0])(np.zeros((1, 2, 2, 3)))
