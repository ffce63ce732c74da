import keras
from keras import ops

from keras_moe.checks import check_text
from keras_moe.recommendation.metrics.labelled import flat
from keras_moe.recommendation.metrics.labelled import ratio_or_nan


@keras.saving.register_keras_serializable("keras_moe")
class NormalizedEntropy(keras.metrics.Metric):
    """Log loss divided by the log loss of always predicting the mean label.

    ```
    rate    = mean label
    entropy = mean of -(y * log(p) + (1 - y) * log(1 - p))
              / -(rate * log(rate) + (1 - rate) * log(1 - rate))
    ```

    Below 1 the predictions are better than the mean label. Unlike the log loss,
    it can be compared between tasks with rare and with frequent events. The
    result is NaN until there is a positive and a negative.

    Args:
        name: str. Defaults to `"normalized_entropy"`.
        dtype: As in `keras.metrics.Metric`. Defaults to `None`.

    Raises:
        ValueError: If `name` is not a string.

    Example:

    >>> entropy = keras_moe.metrics.NormalizedEntropy()
    >>> round(float(entropy([1, 0], [0.5, 0.5])), 3)
    1.0

    Reference:

    - [He et al., 2014](https://doi.org/10.1145/2648584.2648589), section 3
    """

    def __init__(self, name="normalized_entropy", dtype=None):
        if name is not None:
            check_text("name", name)
        super().__init__(name=name, dtype=dtype)
        self.losses = self._sum("losses")
        self.positives = self._sum("positives")
        self.count = self._sum("count")

    def _sum(self, name):
        return self.add_variable(
            (), initializer="zeros", dtype="float32", name=name
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred, weight = flat(y_true, y_pred, sample_weight)
        losses = keras.losses.binary_crossentropy(
            y_true[:, None], y_pred[:, None]
        )
        self.losses.assign_add(ops.sum(weight * losses))
        self.positives.assign_add(ops.sum(weight * y_true))
        self.count.assign_add(ops.sum(weight))

    def result(self):
        count = ops.maximum(self.count.value, 1e-30)
        rate = self.positives.value / count
        both = ops.logical_and(rate > 0, rate < 1)
        safe = ops.where(both, rate, 0.5)
        entropy = -safe * ops.log(safe) - (1 - safe) * ops.log(1 - safe)
        return ratio_or_nan(
            self.losses.value / count, ops.where(both, entropy, 0.0)
        )
