import keras


class Value(keras.losses.Loss):
    """The prediction itself."""

    def call(self, y_true, y_pred):
        return y_pred[:, 0]


class EndOfEpoch(keras.callbacks.Callback):
    """Tells the task weighting that an epoch is over."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.task_weighting.end_epoch()
