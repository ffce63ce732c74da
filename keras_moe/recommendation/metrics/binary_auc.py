import math

import keras
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_text
from keras_moe.recommendation.metrics.labelled import flat
from keras_moe.recommendation.metrics.labelled import ratio_or_nan

# Beyond this, probabilities in float32 are 1.
_LARGEST_LOGIT = 17.0


@keras.saving.register_keras_serializable("keras_moe")
class BinaryAUC(keras.metrics.Metric):
    """Area under the ROC curve, accurate for rare events too.

    It is the probability that a positive is ranked above a negative:

    ```
    auc = mean over pairs of (p_positive > p_negative) + 0.5 * (equal)
    ```

    Predictions are counted in bins of equal width in their logit; predictions
    in one bin count as equal, and so do all predictions below 4e-8.
    (`keras.metrics.AUC` has 200 thresholds between 0 and 1, only four of them
    below 0.02, where all predictions of a rare click may be.) The result is NaN
    until there is a positive and a negative, and if a prediction is NaN.

    Args:
        num_bins: int. Number of bins. With the default, logits that differ by
            less than 0.0083 may count as equal. Defaults to `4096`.
        name: str. Defaults to `"auc"`.
        dtype: As in `keras.metrics.Metric`. Defaults to `None`.

    Raises:
        ValueError: If `num_bins` is not an int of at least 2, or `name` is not
            a string.

    Example:

    >>> auc = keras_moe.metrics.BinaryAUC()
    >>> float(auc([0, 0, 1, 1], [0.001, 0.004, 0.003, 0.005]))
    0.75
    """

    def __init__(self, num_bins=4096, name="auc", dtype=None):
        if name is not None:
            check_text("name", name)
        super().__init__(name=name, dtype=dtype)
        check_int("num_bins", num_bins, 2)
        self.num_bins = num_bins
        self.positives = self._counts("positives")
        self.negatives = self._counts("negatives")

    def _counts(self, name):
        return self.add_variable(
            (self.num_bins,), initializer="zeros", dtype="float32", name=name
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred, weight = flat(y_true, y_pred, sample_weight)
        # A model that has diverged gets NaN instead of a plausible number.
        is_nan = ops.logical_and(ops.isnan(y_pred), weight > 0)
        weight = ops.where(is_nan, math.nan, weight)
        y_pred = ops.where(ops.isnan(y_pred), 0.0, ops.clip(y_pred, 0.0, 1.0))
        logits = ops.log(y_pred) - ops.log1p(-y_pred)
        logits = ops.clip(logits, -_LARGEST_LOGIT, _LARGEST_LOGIT)
        share = (logits + _LARGEST_LOGIT) / (2 * _LARGEST_LOGIT)
        bins = ops.cast(ops.floor(share * self.num_bins), "int32")
        bins = ops.clip(bins, 0, self.num_bins - 1)
        for counts, of_class in (
            (self.positives, y_true),
            (self.negatives, 1.0 - y_true),
        ):
            counts.assign_add(
                ops.segment_sum(weight * of_class, bins, self.num_bins)
            )

    def result(self):
        positives = ops.convert_to_tensor(self.positives)
        negatives = ops.convert_to_tensor(self.negatives)
        below = ops.cumsum(negatives) - 0.5 * negatives
        # Divide before multiplying: the product may be too large for float32
        # to count exactly.
        num_positives, num_negatives = ops.sum(positives), ops.sum(negatives)
        shares = below / ops.maximum(num_negatives, 1e-30)
        return ratio_or_nan(
            ops.sum(positives * shares),
            ops.where(num_negatives > 0, num_positives, 0.0),
        )

    def get_config(self):
        return {**super().get_config(), "num_bins": self.num_bins}
