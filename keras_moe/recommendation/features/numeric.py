import warnings

import keras
import numpy as np
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.checks import check_number
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.recommendation.features.columns import as_floats
from keras_moe.recommendation.features.feature import Feature
from keras_moe.recommendation.features.feature import check_finite


@keras.saving.register_keras_serializable("keras_moe")
class Numeric(Feature):
    """A number: an age, a price, a count.

    ```
    y = (x - offset) / scale
    ```

    Computed in float32 under every dtype policy. A missing number (NaN) gives
    `y = 0`, which is the mean of a standardized feature.

    Args:
        name: str. Name of the feature.
        normalize: `"standard"` (mean 0 and variance 1), `"minmax"` (0 to 1 in
            the data given to `adapt`) or `None`. Defaults to `"standard"`.
        offset: float. Number to subtract. Defaults to `None`: `adapt` learns
            it, or 0 without `normalize`.
        scale: float. Positive number to divide by. Defaults to `None`: `adapt`
            learns it, or 1 without `normalize`.
        log: bool. Whether `sign(x) * log(1 + |x|)` replaces `x`, for prices and
            counts. Defaults to `False`.
        missing_indicator: bool. Whether to add a second number: 1 if the value
            is missing, otherwise 0. Defaults to `False`.

    Raises:
        ValueError: If an argument is out of range or of the wrong kind.

    Example:

    >>> age = keras_moe.layers.Numeric("age", offset=40.0, scale=10.0)
    >>> layer = keras_moe.layers.FeatureEmbedding([age])
    >>> keras.ops.convert_to_numpy(
    ...     layer({"age": np.array([50.0, np.nan])})).tolist()
    [[1.0], [0.0]]
    """

    def __init__(
        self,
        name,
        normalize="standard",
        offset=None,
        scale=None,
        log=False,
        missing_indicator=False,
    ):
        super().__init__(name)
        check_one_of("normalize", normalize, ("standard", "minmax", None))
        if offset is not None:
            check_number("offset", offset)
        if scale is not None:
            check_positive("scale", scale)
        check_bool("log", log)
        check_bool("missing_indicator", missing_indicator)
        if normalize is None:
            offset = 0.0 if offset is None else offset
            scale = 1.0 if scale is None else scale
        self.normalize = normalize
        self.offset = offset
        self.scale = scale
        self.log = bool(log)
        self.missing_indicator = bool(missing_indicator)

    @property
    def lacks(self):
        if self.offset is None or self.scale is None:
            return "`offset` and `scale`"

    def statistics(self):
        return _Moments(self) if self.lacks else None

    def adapt(self, statistics):
        offset, scale = statistics.result(self.normalize)
        low, high = statistics.low, statistics.high
        largest = max(abs(low), abs(high))
        rounding = np.spacing(np.float32(largest))
        if low < high and not self.log and rounding > 0.1 * scale:
            warnings.warn(
                f"Feature {self.name!r} has numbers of up to {largest:.9g}, "
                f"which differ by about {scale:.3g}: float32 rounds much of "
                "that away. Subtract an offset from them first.",
                stacklevel=2,
            )
        self.offset = offset if self.offset is None else self.offset
        self.scale = scale if self.scale is None else self.scale

    def encode(self, values, missing):
        values = as_floats(values, missing, self.name)
        check_finite(self.name, values)
        return values.astype("float32")

    def check(self, values):
        super().check(values)
        check_finite(self.name, values)

    def embed(self, inputs, table=None):
        x = ops.cast(inputs, "float32")
        missing = ops.isnan(x)
        x = ops.where(missing, 0.0, x)
        if self.log:
            x = ops.sign(x) * ops.log1p(ops.abs(x))
        y = ops.where(missing, 0.0, (x - self.offset) / self.scale)
        if not self.missing_indicator:
            return ops.expand_dims(y, -1)
        return ops.stack([y, ops.cast(missing, "float32")], axis=-1)

    @property
    def width(self):
        return 2 if self.missing_indicator else 1

    def get_config(self):
        return {
            **super().get_config(),
            "normalize": self.normalize,
            "offset": self.offset,
            "scale": self.scale,
            "log": self.log,
            "missing_indicator": self.missing_indicator,
        }


class _Moments:
    """Mean, variance and range of all numbers seen."""

    def __init__(self, feature):
        self.feature = feature
        self.count = 0
        self.mean = self.squares = 0.0
        self.low, self.high = np.inf, -np.inf

    def update(self, values, missing):
        x = as_floats(values, missing, self.feature.name)
        check_finite(self.feature.name, x)
        x = x[~np.isnan(x)]
        if not x.size:
            return
        if self.feature.log:
            x = np.sign(x) * np.log1p(np.abs(x))
        # Chan's merge: plain sums of squares cancel where means are large.
        count, mean = self.count + x.size, x.mean()
        delta = mean - self.mean
        self.squares += ((x - mean) ** 2).sum()
        self.squares += delta**2 * self.count * x.size / count
        self.mean += delta * x.size / count
        self.count = count
        self.low, self.high = min(self.low, x.min()), max(self.high, x.max())

    def result(self, normalize):
        if not self.count:
            raise ValueError(
                f"All numbers of feature {self.feature.name!r} are missing."
            )
        if normalize == "minmax":
            offset, scale = self.low, self.high - self.low
        else:
            offset, scale = self.mean, np.sqrt(self.squares / self.count)
        # A constant feature must not become NaN. Its variance may not be
        # exactly 0, because of rounding.
        if self.low == self.high or not scale > 0:
            scale = 1.0
        return float(offset), float(scale)
