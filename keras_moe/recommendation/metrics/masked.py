import math

import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_text


@keras.saving.register_keras_serializable("keras_moe")
class Masked(keras.metrics.Metric):
    """Applies another metric to the examples whose label is not NaN.

    The result is NaN until there is a label.

    Args:
        metric: A `keras.metrics.Metric` that takes `sample_weight`, or anything
            `keras.metrics.get` accepts.
        name: str. Defaults to `None`: the metric's name.
        dtype: As in `keras.metrics.Metric`. Defaults to `None`.

    Raises:
        ValueError: If `metric` is not a metric, or `name` is not a string.

    Example:

    >>> metric = keras_moe.metrics.Masked(keras.metrics.BinaryAccuracy())
    >>> float(metric([1.0, float("nan"), 0.0], [0.9, 0.9, 0.8]))
    0.5
    """

    def __init__(self, metric, name=None, dtype=None):
        if isinstance(metric, dict):
            metric = as_keras_object(
                "metric", keras.saving.deserialize_keras_object, metric
            )
        if not isinstance(metric, keras.metrics.Metric):
            given = metric
            metric = as_keras_object("metric", keras.metrics.get, metric)
            if not isinstance(metric, keras.metrics.Metric) and callable(
                metric
            ):
                function_name = getattr(metric, "__name__", "metric")
                metric = keras.metrics.MeanMetricWrapper(
                    metric,
                    name=given if isinstance(given, str) else function_name,
                )
        if not isinstance(metric, keras.metrics.Metric):
            raise ValueError(
                f"`metric` must be a metric. Received: metric={metric!r}"
            )
        if name is not None:
            check_text("name", name)
        super().__init__(name=name or metric.name, dtype=dtype)
        self.metric = metric
        self.total = self.add_variable(
            (), initializer="zeros", dtype="float32", name="total"
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true = ops.convert_to_tensor(y_true)
        if not keras.backend.is_float_dtype(y_true.dtype):
            y_true = ops.cast(y_true, "float32")
        y_pred = ops.convert_to_tensor(y_pred)
        # One row per label: (B,) and (B, 1) would broadcast to (B, B).
        y_true = ops.reshape(y_true, (-1, 1))
        if len(y_pred.shape) == 1:
            y_pred = ops.expand_dims(y_pred, 1)
        known = ops.logical_not(ops.isnan(y_true))
        weight = ops.cast(known, "float32")
        self.total.assign_add(ops.sum(weight))
        if sample_weight is not None:
            given = ops.reshape(ops.cast(sample_weight, "float32"), (-1, 1))
            weight = ops.where(known, given, 0.0)
        self.metric.update_state(
            ops.where(known, y_true, ops.zeros_like(y_true)),
            y_pred,
            sample_weight=ops.squeeze(weight, axis=1),
        )

    def result(self):
        result = self.metric.result()
        return ops.where(self.total > 0, result, math.nan)

    def reset_state(self):
        super().reset_state()
        self.metric.reset_state()

    def get_config(self):
        return {
            **super().get_config(),
            "metric": keras.saving.serialize_keras_object(self.metric),
        }
