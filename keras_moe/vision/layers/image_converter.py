import keras
from keras import ops

from keras_moe.checks import as_ints
from keras_moe.checks import check_bool
from keras_moe.checks import check_number
from keras_moe.checks import check_one_of

INTERPOLATIONS = ("bilinear", "nearest", "bicubic", "lanczos3", "lanczos5")


@keras.saving.register_keras_serializable("keras_moe")
class ImageConverter(keras.layers.Layer):
    """Makes of raw images what a model takes.

    ```
    y = resize(images) * scale + offset
    ```

    Args:
        image_size: int, or two for height and width, or `None` to leave the
            size as it is. Defaults to `None`.
        scale: float, or a list of one for each channel. Defaults to `None`, no
            scaling.
        offset: float, or a list of one for each channel. Defaults to `None`,
            nothing is added.
        crop_to_aspect_ratio: bool. Whether images of another aspect ratio are
            cropped rather than stretched. Defaults to `True`.
        pad_to_aspect_ratio: bool. Whether they are padded with zeros. Defaults
            to `False`.
        interpolation: `"bilinear"`, `"nearest"`, `"bicubic"`, `"lanczos3"` or
            `"lanczos5"`. Defaults to `"bilinear"`.
        antialias: bool. Whether images are smoothed before they get smaller.
            Defaults to `False`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `None`, that of the Keras configuration.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of ints or floats. Computed in float32.

    Input shape:
        `(batch, height, width, channels)`, or with the channels first.

    Output shape:
        The same with `image_size` as height and width.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> converter = keras_moe.layers.ImageConverter((32, 32), scale=1 / 255)
    >>> tuple(converter(np.full((2, 40, 50, 3), 255, "uint8")).shape)
    (2, 32, 32, 3)
    """

    def __init__(
        self,
        image_size=None,
        scale=None,
        offset=None,
        crop_to_aspect_ratio=True,
        pad_to_aspect_ratio=False,
        interpolation="bilinear",
        antialias=False,
        data_format=None,
        **kwargs,
    ):
        # Keras would round ints of more than 256 to half precision.
        super().__init__(**{"autocast": False, **kwargs})
        if image_size is not None:
            image_size = as_ints("image_size", image_size, 2, minimum=1)
        check_bool("crop_to_aspect_ratio", crop_to_aspect_ratio)
        check_bool("pad_to_aspect_ratio", pad_to_aspect_ratio)
        check_bool("antialias", antialias)
        if pad_to_aspect_ratio and crop_to_aspect_ratio:
            raise ValueError(
                "`pad_to_aspect_ratio=True` needs `crop_to_aspect_ratio=False`."
                " Received: both are True"
            )
        check_one_of("interpolation", interpolation, INTERPOLATIONS)
        if data_format is None:
            data_format = keras.config.image_data_format()
        check_one_of(
            "data_format", data_format, ("channels_last", "channels_first")
        )
        self.image_size = image_size
        self.scale = _numbers("scale", scale)
        self.offset = _numbers("offset", offset)
        self.crop_to_aspect_ratio = crop_to_aspect_ratio
        self.pad_to_aspect_ratio = pad_to_aspect_ratio
        self.interpolation = interpolation
        self.antialias = antialias
        self.data_format = data_format
        self._resizing = None
        if image_size is not None:
            self._resizing = keras.layers.Resizing(
                *image_size,
                interpolation=interpolation,
                crop_to_aspect_ratio=crop_to_aspect_ratio,
                pad_to_aspect_ratio=pad_to_aspect_ratio,
                antialias=antialias,
                data_format=data_format,
                dtype="float32",
            )

    def build(self, inputs_shape):
        first = self.data_format == "channels_first"
        channels = inputs_shape[1 if first else -1]
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != channels:
                raise ValueError(
                    f"A list as `{name}` must have a number for each of the "
                    f"{channels} channels. Received: {name}={value}"
                )

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        if self._resizing is not None:
            x = self._resizing(x)
        if self.scale is not None:
            x = x * self._by_channel(self.scale)
        if self.offset is not None:
            x = x + self._by_channel(self.offset)
        return ops.cast(x, self.compute_dtype)

    def _by_channel(self, value):
        value = ops.convert_to_tensor(value, "float32")
        if len(value.shape) and self.data_format == "channels_first":
            value = ops.reshape(value, (-1, 1, 1))
        return value

    def compute_output_shape(self, inputs_shape):
        if self.image_size is None:
            return tuple(inputs_shape)
        if self.data_format == "channels_first":
            return (*inputs_shape[:2], *self.image_size)
        return (inputs_shape[0], *self.image_size, inputs_shape[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "image_size": self.image_size,
            "scale": self.scale,
            "offset": self.offset,
            "crop_to_aspect_ratio": self.crop_to_aspect_ratio,
            "pad_to_aspect_ratio": self.pad_to_aspect_ratio,
            "interpolation": self.interpolation,
            "antialias": self.antialias,
            "data_format": self.data_format,
        }


def _numbers(name, value):
    """`None`, a float, or a list of floats."""
    if value is None:
        return None
    for x in value if isinstance(value, (list, tuple)) else [value]:
        check_number(name, x)
    if isinstance(value, (list, tuple)):
        return [float(x) for x in value]
    return float(value)
