"""What the metrics have in common."""

import math

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
    """NaN where nothing was counted: a 0 would look like a result."""
    counted = denominator > 0
    return ops.where(
        counted, numerator / ops.where(counted, denominator, 1.0), math.nan
    )
