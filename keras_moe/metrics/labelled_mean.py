import keras
from keras import ops

from keras_moe.metrics.parts import ratio_or_nan


class LabelledMean(keras.metrics.Metric):
    """Mean of batch means over all labels; NaN if there were none.

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
        """Takes a mean, and the number of labels it is of."""
        self.total.assign_add(ops.cast(mean * count, "float32"))
        self.count.assign_add(count)

    def result(self):
        return ratio_or_nan(self.total.value, self.count.value)
