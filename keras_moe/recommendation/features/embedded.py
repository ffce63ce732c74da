import keras
import numpy as np
from keras import ops

from keras_moe.checks import check_int
from keras_moe.recommendation.features.columns import as_floats
from keras_moe.recommendation.features.columns import missing as missing_values
from keras_moe.recommendation.features.feature import Feature
from keras_moe.recommendation.features.feature import check_finite


@keras.saving.register_keras_serializable("keras_moe")
class Embedded(Feature):
    """A ready-made vector: of an image, of a text, from another model.

    The model takes it unchanged. A missing vector (NaNs, or `None` in a column
    of lists) becomes zeros.

    Args:
        name: str. Name of the feature.
        dim: int. Width of the vectors. Defaults to `None`: `adapt`
            learns it.

    Raises:
        ValueError: If `dim` is not a positive int.

    Example:

    >>> image = keras_moe.layers.Embedded("image", dim=512)
    """

    def __init__(self, name, dim=None):
        super().__init__(name)
        if dim is not None:
            check_int("dim", dim, 1)
        self.dim = dim

    @property
    def input_shape(self):
        return (self.dim,)

    @property
    def lacks(self):
        return "`dim`" if self.dim is None else None

    def statistics(self):
        return _Width() if self.lacks else None

    def adapt(self, statistics):
        if statistics.width is None:
            raise ValueError(
                f"All vectors of feature {self.name!r} are missing."
            )
        self.dim = statistics.width

    def encode(self, values, missing):
        if values.ndim == 1:
            rows = np.full((len(values), self.dim), np.nan)
            for i in np.flatnonzero(~missing):
                if np.shape(values[i]) != (self.dim,):
                    raise ValueError(
                        f"The vectors of feature {self.name!r} must be of "
                        f"length {self.dim}. Received: {values[i]!r}"
                    )
                row = np.asarray(values[i])
                rows[i] = as_floats(row, missing_values(row), self.name)
            values = rows
        values = as_floats(values, missing_values(values), self.name)
        check_finite(self.name, values)
        self.check(values)
        return values.astype("float32")

    def embed(self, inputs, table=None):
        x = ops.cast(inputs, "float32")
        return ops.where(ops.isnan(x), 0.0, x)

    @property
    def width(self):
        return self.dim

    def get_config(self):
        return {**super().get_config(), "dim": self.dim}


class _Width:
    """The width of the vectors seen."""

    width = None

    def update(self, values, missing):
        if values.ndim == 2:
            self.width = values.shape[1]
        elif not missing.all():
            self.width = len(values[~missing][0])
