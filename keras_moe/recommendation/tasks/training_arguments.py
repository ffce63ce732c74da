"""Checks and converts arguments of `MultiTaskModel`, `compile` and `fit`."""

import keras
import numpy as np

from keras_moe import backend
from keras_moe.recommendation.metrics.binary_auc import BinaryAUC
from keras_moe.recommendation.metrics.masked import Masked
from keras_moe.recommendation.tasks.labels import check_labels
from keras_moe.recommendation.tasks.weighting.static_weighting import (
    StaticWeighting,
)


def check_graph(inputs, outputs, tasks):
    """Raises if these cannot be the graph of a `MultiTaskModel`."""
    check_tensors("inputs", inputs)
    check_tensors("outputs", outputs)
    names = [task.name for task in tasks]
    if not isinstance(outputs, dict) or set(outputs) != set(names):
        raise ValueError(
            "`outputs` must be a dict with one tensor a task. Received: "
            f"outputs={outputs!r}, tasks={names}"
        )
    for task in tasks:
        shape = tuple(outputs[task.name].shape)
        if len(shape) != 2 or shape[1] != task.output_dim:
            raise ValueError(
                f"The output of task {task.name!r} must be of shape (batch, "
                f"{task.output_dim}). Received: shape={shape}"
            )
    for name, tensor in inputs.items() if isinstance(inputs, dict) else ():
        if tensor.name != name:
            raise ValueError(
                "`inputs` must be a dict of `keras.Input` by their names. "
                f"Received: {name!r} of name {tensor.name!r}"
            )


def check_tensors(argument, given):
    """Raises unless all that is in it are symbolic tensors of Keras."""
    for tensor in keras.tree.flatten(given):
        if not isinstance(tensor, keras.KerasTensor):
            raise ValueError(
                f"`{argument}` must be made of tensors of a graph, as "
                f"`keras.Input` gives. Received: {argument}={given!r}"
            )


def check_compile(model, weighting, loss_weights):
    """Raises if the model cannot be trained in this way."""
    if loss_weights is not None:
        raise ValueError(
            "The weight of a task is `TaskSpec.weight`; `loss_weights` is not "
            f"taken. Received: loss_weights={loss_weights!r}"
        )
    replicas = backend.num_replicas(model)
    if replicas > 1 and not isinstance(weighting, StaticWeighting):
        raise ValueError(
            "Under a TensorFlow strategy each replica would weigh the tasks by "
            "its own part of the batch. Use task_weighting='static'. Received: "
            f"task_weighting={weighting!r}, {replicas} replicas"
        )


def labels_by_task(y):
    """Labels as `fit` takes them: a frame becomes a dict, a list an array.

    Anything but a frame or a dict is returned unchanged.
    """
    if hasattr(y, "columns"):
        y = {name: y[name] for name in y.columns}
    if not isinstance(y, dict):
        return y
    return {name: _as_array(values) for name, values in y.items()}


def _as_array(values):
    if isinstance(values, list):
        values = np.asarray(values)
    if getattr(getattr(values, "dtype", None), "kind", None) == "O":
        try:
            # `None` becomes NaN.
            return np.asarray(values, "float32")
        except (TypeError, ValueError):
            return values  # A later check says what is wrong.
    if hasattr(getattr(values, "dtype", None), "na_value"):
        # A dtype of pandas, whose missing values are not NaN.
        return values.to_numpy("float32", na_value=np.nan)
    return values


def check_data(model, x, y=None, needs_labels=True):
    """Raises if NumPy arrays do not fit the model's features or tasks.

    With `needs_labels`, each task must have a label. Of a `tf.data.Dataset`,
    only the `element_spec` is checked.
    """
    described = getattr(x, "element_spec", None)
    if described is not None:
        x = described[0] if isinstance(described, tuple) else described
    check_no_frame(x)
    check_labels(model.tasks, y, needs_labels)
    for layer in model.layers if isinstance(x, dict) else ():
        if hasattr(layer, "check_data"):
            layer.check_data(x)


def check_no_frame(x):
    """Raises if the inputs are a frame."""
    if hasattr(x, "columns"):
        raise ValueError(
            "`x` must be a dict of arrays by feature, as `encode` of a "
            f"FeatureEmbedding returns. Received: {type(x).__name__}"
        )


def by_task(argument, given, tasks):
    """An argument of `compile` as a dict by task."""
    names = [task.name for task in tasks]
    if given is None or isinstance(given, str) and given == "auto":
        return {name: given for name in names}
    if not isinstance(given, dict) or not set(given) <= set(names):
        raise ValueError(
            f"`{argument}` must be 'auto', or a dict by task. Received: "
            f"{argument}={given!r}, tasks={names}"
        )
    return given


def masked_metrics(argument, given, tasks):
    """Lists of `Masked` metrics by task, or `None` if there are none."""
    given = by_task(argument, given, tasks)
    masked = {}
    for task in tasks:
        masked[task.name] = [
            Masked(_auto_metric(task) if m == "auto" else m)
            for m in as_list(given.get(task.name))
        ]
        if len(tasks) == 1:
            # Keras leaves out the name of a single output.
            for metric in masked[task.name]:
                metric.name = f"{task.name}_{metric.name}"
    return masked if any(masked.values()) else None


def _auto_metric(task):
    if task.type == "binary":
        return BinaryAUC()
    if task.type == "regression":
        return keras.metrics.RootMeanSquaredError(name="rmse")
    return keras.metrics.SparseCategoricalAccuracy(name="accuracy")


def as_list(value):
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
