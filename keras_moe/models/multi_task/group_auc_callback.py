import keras
import numpy as np

from keras_moe.metrics.group_auc import group_auc


class GroupAUC(keras.callbacks.Callback):
    """Writes the grouped AUC of tasks into the logs of each epoch.

    After each epoch the model predicts `x`, and `val_<task>_gauc` is what
    `keras_moe.metrics.group_auc` makes of it: it needs all predictions at once,
    which a metric does not have. Callbacks after it in the list, such as
    `EarlyStopping`, find it in the logs.

    Args:
        x: Inputs of the model, as NumPy arrays.
        y: Dict of label arrays by task; those in it are evaluated.
        groups: Array of group ids, one an example.
        weighting: As in `group_auc`. Defaults to `"size"`.
        batch_size: int. Batch size of `predict`. Defaults to `1024`.

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
        self.x = x
        self.y = {name: np.asarray(label) for name, label in y.items()}
        self.groups = np.asarray(groups)
        self.weighting = weighting
        self.batch_size = batch_size

    def on_epoch_end(self, epoch, logs=None):
        predictions = self.model.predict(
            self.x, batch_size=self.batch_size, verbose=0
        )
        for name, label in self.y.items():
            logs[f"val_{name}_gauc"] = group_auc(
                label, predictions[name], self.groups, self.weighting
            )
