import keras

from keras_moe.checks import check_number
from keras_moe.checks import check_several
from keras_moe.checks import check_text


class CombineLogs(keras.callbacks.Callback):
    """Combines logs into one number, to stop early on several tasks.

    ```
    logs[name] = sum of weight * logs[key] / sum of |weight|
    ```

    The number enters the logs of each epoch, where the history and the
    callbacks after this one in the list find it. It is NaN if one of the logs
    is NaN. Epochs without validation get no number if it needs `val_` logs.

    Args:
        weights: Dict of floats by the names of logs; negative for logs that
            should become small. A list of names gives each a weight of 1.
        name: str. Name of the result. Defaults to `"val_combined"`.

    Raises:
        ValueError: If all weights are 0, a weight is not a finite number, or
            `name` is not a string; at the end of the first epoch, if a log is
            missing although there are `val_` logs.

    Example:

    >>> callbacks = [
    ...     keras_moe.callbacks.CombineLogs(
    ...         {"val_click_auc": 1.0, "val_watch_rmse": -0.1}),
    ...     keras.callbacks.EarlyStopping(
    ...         "val_combined", mode="max", patience=3),
    ... ]
    """

    def __init__(self, weights, name="val_combined"):
        super().__init__()
        check_several("weights", weights)
        check_text("name", name)
        if not isinstance(weights, dict):
            weights = {key: 1.0 for key in weights}
        for key, weight in weights.items():
            if not isinstance(key, str):
                raise ValueError(
                    "`weights` must have names of logs as its keys. "
                    f"Received: weights={weights}"
                )
            check_number("weights", weight)
        if not any(weights.values()):
            raise ValueError(
                "`weights` must hold a weight that is not 0. "
                f"Received: weights={weights}"
            )
        self.weights = weights
        self.name = name

    def on_epoch_end(self, epoch, logs=None):
        missing = [key for key in self.weights if key not in logs]
        if missing:
            needs_validation = all(key.startswith("val_") for key in missing)
            if needs_validation and not any(k.startswith("val_") for k in logs):
                return
            raise ValueError(
                f"No log of the name {missing[0]!r}. Received: {sorted(logs)}"
            )
        total = sum(w * float(logs[key]) for key, w in self.weights.items())
        logs[self.name] = total / sum(abs(w) for w in self.weights.values())
