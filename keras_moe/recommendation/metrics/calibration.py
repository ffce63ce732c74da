import keras
from keras import ops

from keras_moe.checks import check_text
from keras_moe.recommendation.metrics.labelled import flat
from keras_moe.recommendation.metrics.labelled import ratio_or_nan


@keras.saving.register_keras_serializable("keras_moe")
class Calibration(keras.metrics.Metric):
    """Sum of predictions divided by sum of labels.

    ```
    calibration = sum of predictions / sum of labels
    ```

    It is 1 for a model that is right on average, above 1 for a model that
    predicts too much, and NaN until there is a positive label.

    Args:
        name: str. Defaults to `"calibration"`.
        dtype: As in `keras.metrics.Metric`. Defaults to `None`.

    Raises:
        ValueError: If `name` is not a string.

    Example:

    >>> calibration = keras_moe.metrics.Calibration()
    >>> float(calibration([1, 0, 0, 1], [0.75, 0.5, 0.25, 1.0]))
    1.25

    Reference:

    - [He et al., 2014](https://doi.org/10.1145/2648584.2648589), section 3
    """

    def __init__(self, name="calibration", dtype=None):
        if name is not None:
            check_text("name", name)
        super().__init__(name=name, dtype=dtype)
        self.predicted = self._sum("predicted")
        self.happened = self._sum("happened")

    def _sum(self, name):
        return self.add_variable(
            (), initializer="zeros", dtype="float32", name=name
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true, y_pred, weight = flat(y_true, y_pred, sample_weight)
        self.predicted.assign_add(ops.sum(weight * y_pred))
        self.happened.assign_add(ops.sum(weight * y_true))

    def result(self):
        return ratio_or_nan(self.predicted.value, self.happened.value)
