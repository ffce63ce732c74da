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

    After each epoch the model predicts `x`, and `val_<task>_gauc` is what
    `keras_moe.metrics.group_auc` makes of it: it needs all predictions at once,
    which a metric does not have. Callbacks after it in the list, such as
    `EarlyStopping`, find it in the logs.

    Args:
        x: Inputs of the model, as NumPy arrays.
        y: Dict of label arrays by task; those in it are evaluated. As in `fit`
            a label may be missing, and one outside the sample space of its task
            does not count: the space's own label must then be there too.
        groups: Array of group ids, one an example.
        weighting: As in `group_auc`. Defaults to `"size"`.
        batch_size: int. Batch size of `predict`. Defaults to `1024`.

    Raises:
        ValueError: When training begins, if `y` has an entry that is not a
            task of the model, or lacks the entry of a sample space.

    Example:

    ```python
    gauc = keras_moe.models.GroupAUC(
        x_val, {"click": y_val["click"]}, groups=users_val)
    model.fit(x, y, epochs=10, callbacks=[
        gauc,
        keras.callbacks.EarlyStopping("val_click_gauc", mode="max"),
    ])
    ```
    """

    def __init__(self, x, y, groups, weighting="size", batch_size=1024):
        super().__init__()
        check_one_of("weighting", weighting, WEIGHTINGS)
        if batch_size is not None:
            # NumPy's ints are no ints of Python.
            if isinstance(batch_size, np.integer):
                batch_size = int(batch_size)
            check_int("batch_size", batch_size, 1)
        self.x = x
        self.y = _checked_labels(labels_by_task(y))
        self.groups = _checked_groups(groups, self.y)
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


def _checked_labels(y):
    if not isinstance(y, dict) or not all(map(np.ndim, y.values())):
        raise ValueError(
            f"`y` must be a dict of label arrays by task. Received: y={y!r}"
        )
    return y


def _checked_groups(groups, y):
    """An array `(N,)` of as many group ids as each task has labels."""
    ids = np.asarray(groups)
    lengths = {name: len(labels) for name, labels in y.items()}
    if not ids.ndim or set(lengths.values()) - {ids.size}:
        raise ValueError(
            "`groups` must be one id an example. Received: groups of shape "
            f"{ids.shape}, labels of lengths {lengths}"
        )
    return ids
