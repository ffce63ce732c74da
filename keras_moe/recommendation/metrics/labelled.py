"""Helpers that the metrics share."""

import math

import keras
from keras import ops


def flat(y_true, y_pred, sample_weight=None):
    """Labels, predictions and weights as float32 `(N,)`."""
    y_true = ops.reshape(ops.cast(y_true, "float32"), (-1,))
    y_pred = ops.reshape(ops.cast(y_pred, "float32"), (-1,))
    if sample_weight is None:
        return y_true, y_pred, ops.ones_like(y_true)
    return (
        y_true,
        y_pred,
        ops.reshape(ops.cast(sample_weight, "float32"), (-1,)),
    )


def ratio_or_nan(numerator, denominator):
    """The ratio, or NaN where nothing was counted (not 0)."""
    counted = denominator > 0
    return ops.where(
        counted, numerator / ops.where(counted, denominator, 1.0), math.nan
    )


class LabelledMean(keras.metrics.Metric):
    """Mean over all labels, from the means of batches; NaN without labels.

    Args:
        name: str.
        dtype: As in `keras.metrics.Metric`.
    """

    def __init__(self, name="labelled_mean", dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.total = self._sum("total")
        self.count = self._sum("count")

    def _sum(self, name):
        return self.add_variable(
            (), initializer="zeros", dtype="float32", name=name
        )

    def update_state(self, mean, count):
        """Adds a mean over `count` labels."""
        self.total.assign_add(ops.cast(mean * count, "float32"))
        self.count.assign_add(count)

    def result(self):
        return ratio_or_nan(self.total.value, self.count.value)
