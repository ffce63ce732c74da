import keras
import numpy as np

from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.recommendation.metrics.group_auc import WEIGHTINGS
from keras_moe.recommendation.metrics.group_auc import group_auc
from keras_moe.recommendation.tasks.labels import labels_of
from keras_moe.recommendation.tasks.training_arguments import labels_by_task


class GroupAUC(keras.callbacks.Callback):
    """Writes the grouped AUC of tasks into the logs of each epoch.

    After each epoch the model predicts `x`, and `val_<task>_gauc` is the
    `keras_moe.metrics.group_auc` of the predictions. (No metric can compute it:
    it needs all predictions at once.) The history and the callbacks after this
    one in the list, `EarlyStopping` for example, find it in the logs.

    Args:
        x: Inputs of the model, as NumPy arrays.
        y: Dict of label arrays by task; these tasks are evaluated. As in `fit`,
            labels may be NaN, and labels outside the sample space of their task
            do not count: `y` must then hold the sample space's labels too.
        groups: Array of group ids, one for each example.
        weighting: As in `group_auc`. Defaults to `"size"`.
        batch_size: int. Batch size of `predict`, or `None` for its default.
            Defaults to `1024`.

    Raises:
        ValueError: If an argument is of the wrong kind, or the numbers of
            labels and groups differ; when training begins, if `y` has an entry
            that is not a task of the model, or lacks the labels of a sample
            space.

    Example:

    >>> x_val = {"city": np.array([0, 1, 1, 0])}
    >>> gauc = keras_moe.models.GroupAUC(
    ...     x_val, {"click": [1, 0, 1, 0]}, groups=["ann", "ann", "bob", "bob"])
    >>> callbacks = [
    ...     gauc,
    ...     keras.callbacks.EarlyStopping("val_click_gauc", mode="max"),
    ... ]
    """

    def __init__(self, x, y, groups, weighting="size", batch_size=1024):
        super().__init__()
        check_one_of("weighting", weighting, WEIGHTINGS)
        if batch_size is not None:
            # `np.integer` is not a subclass of `int`.
            if isinstance(batch_size, np.integer):
                batch_size = int(batch_size)
            check_int("batch_size", batch_size, 1)
        self.x = x
        self.y = _as_labels(labels_by_task(y))
        self.groups = _as_group_ids(groups, self.y)
        self.weighting = weighting
        self.batch_size = batch_size

    def on_train_begin(self, logs=None):
        tasks = {task.name: task for task in self.model.tasks}
        wrong = sorted(set(self.y) - set(tasks))
        if wrong:
            raise ValueError(
                "`y` must be a dict of labels by task. Received entries for "
                f"{wrong}, tasks: {sorted(tasks)}"
            )
        present = [tasks[name] for name in self.y]
        spaces = {task.sample_space for task in present} - {None, *self.y}
        if spaces:
            raise ValueError(
                "`y` must have the labels of the sample spaces of its tasks. "
                f"Missing: {sorted(spaces)}. Received: {sorted(self.y)}"
            )
        self._labels = labels_of(present, self.y, self.model.entire_space)

    def on_epoch_end(self, epoch, logs=None):
        predictions = self.model.predict(
            self.x, batch_size=self.batch_size, verbose=0
        )
        for name, label in self._labels.items():
            label = keras.ops.convert_to_numpy(label)
            logs[f"val_{name}_gauc"] = group_auc(
                label, predictions[name], self.groups, self.weighting
            )


def _as_labels(y):
    """The labels, if they are a dict of arrays."""
    if not isinstance(y, dict) or not all(map(np.ndim, y.values())):
        raise ValueError(
            f"`y` must be a dict of label arrays by task. Received: y={y!r}"
        )
    return y


def _as_group_ids(groups, y):
    """An array of group ids, as many as each task has labels."""
    ids = np.asarray(groups)
    lengths = {name: len(labels) for name, labels in y.items()}
    if not ids.ndim or set(lengths.values()) - {ids.size}:
        raise ValueError(
            "`groups` must be one id an example. Received: groups of shape "
            f"{ids.shape}, labels of lengths {lengths}"
        )
    return ids
