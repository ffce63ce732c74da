import keras

from keras_moe.checks import check_number
from keras_moe.checks import check_several
from keras_moe.checks import check_text


class CombineLogs(keras.callbacks.Callback):
    """One number of several, to stop early on several tasks.

    ```
    logs[name] = sum of weight * logs[key] / sum of |weight|
    ```

    It writes into the logs of each epoch, where callbacks that come after it
    in the list, and the history, find it. A NaN among the logs makes it NaN; in
    epochs without one of them (as without validation) it writes nothing.

    Args:
        weights: Dict of floats by the names of logs; negative for what should
            be small. A list of names stands for weights of 1.
        name: str. Name of the result. Defaults to `"val_combined"`.

    Raises:
        ValueError: If there is no weight, or none but zeros, or one is not
            finite; at the end of the first epoch, if a log is not there
            although there are `val_` logs.

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
