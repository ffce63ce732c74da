"""Labels of several tasks, and the losses of examples that have them."""

import math

import keras
import numpy as np
from keras import ops

from keras_moe.checks import as_keras_object

AUTO_LOSSES = {
    "binary": "binary_crossentropy",
    "regression": "mean_squared_error",
    "multiclass": "sparse_categorical_crossentropy",
}


def labels_of(tasks, y, entire_space=False):
    """The labels `{task: (B,) float32}`, NaN where a task has none.

    Args:
        tasks: Sequence of `TaskSpec`.
        y: Dict of tensors `(B,)` or `(B, 1)` by the name of the task. A single
            task may have the tensor alone.
        entire_space: bool. Whether labels outside the sample space of their
            task are 0, not missing. Defaults to `False`.

    Raises:
        ValueError: If a task has no entry, or one of another shape.
    """
    if len(tasks) == 1 and y is not None and not isinstance(y, dict):
        y = {tasks[0].name: y}
    missing = [
        t.name
        for t in tasks
        if not isinstance(y, dict) or y.get(t.name) is None
    ]
    if missing:
        raise ValueError(
            "`y` must be a dict with the labels of every task (NaN where an "
            f"example has none). Missing: {missing}. Received: "
            f"{sorted(y) if isinstance(y, dict) else type(y).__name__}"
        )
    labels = {}
    for task in tasks:
        label, shape = y[task.name], tuple(y[task.name].shape)
        if len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != 1):
            raise ValueError(
                f"The labels of task {task.name!r} must be of shape (batch,) "
                f"or (batch, 1). Received: shape={shape}"
            )
        label = ops.cast(label, "float32")
        if len(shape) == 2:
            label = ops.squeeze(label, axis=1)
        if task.missing_value is not None:
            missing = ops.equal(label, task.missing_value)
            label = ops.where(missing, math.nan, label)
        labels[task.name] = label
    by_name = {task.name: task for task in tasks}

    def inside(name):
        space = by_name[name].sample_space
        if space is None:
            return labels[name]
        if entire_space:  # Without a click there is no purchase.
            return ops.where(inside(space) <= 0.5, 0.0, labels[name])
        # Comparisons with NaN are false: where it is not known whether the
        # example is in the sample space, the label is missing.
        return ops.where(inside(space) > 0.5, labels[name], math.nan)

    return {task.name: inside(task.name) for task in tasks}


def resolve_loss(task, identifier):
    """A task's loss as a function `(y_true (B, 1), y_pred (B, O)) -> (B,)`."""
    if identifier is None or identifier == "auto":
        identifier = AUTO_LOSSES[task.type]
    loss = as_keras_object("loss", keras.losses.get, identifier)
    # A loss object would reduce over missing labels too.
    return loss.call if isinstance(loss, keras.losses.Loss) else loss


def weights_of(tasks, sample_weight):
    """The sample weights `{task: (B,)}`, `None` for a task without any."""
    weights = {}
    names = {task.name for task in tasks}
    if isinstance(sample_weight, dict) and not set(sample_weight) <= names:
        raise ValueError(
            "`sample_weight` must be an array, or a dict of these by task. "
            f"Received: {sorted(sample_weight)}, tasks: {sorted(names)}"
        )
    for task in tasks:
        weight = sample_weight
        if isinstance(weight, dict):
            weight = weight.get(task.name)
        if weight is not None:
            weight = ops.reshape(ops.cast(weight, "float32"), (-1,))
        weights[task.name] = weight
    return weights


def task_losses(tasks, losses, y, y_pred, sample_weight, entire_space):
    """The tasks' losses and their numbers of labels, as two lists.

    Args:
        tasks: Sequence of `TaskSpec`.
        losses: Dict of functions by task, see `resolve_loss`.
        y: As in `labels_of`.
        y_pred: Dict of predictions by task.
        sample_weight: Tensor `(B,)`, a dict of these by task, or `None`.
        entire_space: As in `labels_of`.
    """
    labels = labels_of(tasks, y, entire_space)
    weights = weights_of(tasks, sample_weight)
    found = [
        task_loss(
            task,
            losses[task.name],
            labels[task.name],
            y_pred[task.name],
            weights[task.name],
        )
        for task in tasks
    ]
    return [loss for loss, _ in found], [count for _, count in found]


def task_loss(task, loss, label, y_pred, weight=None):
    """The mean loss of the examples with a label, and their number.

    ```
    loss = sum of weight * class_weight * loss / number of labels
    ```

    It is 0 without labels, and NaN if a label is not one the task allows.
    """
    known = ops.logical_not(ops.isnan(label))  # (B,)
    # Neither the loss of a missing label nor its gradient may be NaN.
    label = ops.where(known, label, 0.0)
    y_pred = ops.cast(y_pred, "float32")
    if len(y_pred.shape) == 1:
        y_pred = ops.expand_dims(y_pred, 1)
    values = ops.reshape(loss(ops.expand_dims(label, 1), y_pred), (-1,))
    if task.type != "regression":
        # Some losses give a finite number for an impossible label.
        values = ops.where(_is_possible(task, label), values, math.nan)
    if task.class_weights is not None:
        values = values * _class_weights(task, label)
    if weight is not None:
        # The loss of a missing label may be NaN too.
        values = values * ops.where(known, weight, 0.0)
    count = ops.sum(ops.cast(known, "float32"))
    total = ops.sum(ops.where(known, ops.cast(values, "float32"), 0.0))
    return total / ops.maximum(count, 1.0), count


def _is_possible(task, label):
    """Which labels `check_labels` would accept."""
    upper = 1.0 if task.type == "binary" else task.output_dim - 1.0
    possible = ops.abs(label - upper / 2) <= upper / 2
    if task.type == "multiclass":
        is_whole = ops.equal(label, ops.floor(label))
        possible = ops.logical_and(possible, is_whole)
    return possible


def _class_weights(task, label):
    if task.type == "binary":  # The label may be a probability.
        negative, positive = task.class_weights
        return negative + (positive - negative) * label
    return ops.take(
        ops.convert_to_tensor(task.class_weights, "float32"),
        ops.cast(label, "int32"),
        axis=0,
    )


def check_labels(tasks, y, needs_labels=True):
    """Raises if NumPy labels do not fit their tasks.

    Only NumPy arrays and pandas columns are checked.
    """
    if len(tasks) == 1 and not isinstance(y, dict):
        y = {tasks[0].name: y}
    for task in tasks if isinstance(y, dict) else ():
        values = y.get(task.name)
        if hasattr(values, "to_numpy"):
            values = values.to_numpy()
        if not isinstance(values, np.ndarray):
            continue
        if values.dtype.kind not in "biuf":
            raise ValueError(
                f"The labels of task {task.name!r} must be numbers. "
                f"Received: dtype={values.dtype}"
            )
        values = values[~np.isnan(values)]
        if task.missing_value is not None:
            values = values[values != task.missing_value]
        if needs_labels and not values.size:
            raise ValueError(
                f"Task {task.name!r} has no label at all: all are missing. "
                "Leave the task out, or give it labels."
            )
        upper = {"binary": 1, "multiclass": task.output_dim - 1}.get(task.type)
        if upper is None:
            wrong = ~np.isfinite(values)
        else:
            wrong = (values < 0) | (values > upper)
        if task.type == "multiclass":
            wrong |= values != np.floor(values)
        if wrong.any():
            raise ValueError(
                f"The labels of the {task.type} task {task.name!r} must be "
                + (
                    "finite"
                    if upper is None
                    else f"{'whole numbers ' * (task.type == 'multiclass')}"
                    f"from 0 to {upper}"
                )
                + f", or NaN if missing. Received: {values[wrong][:5]}"
            )
