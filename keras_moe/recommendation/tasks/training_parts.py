import keras

from keras_moe.recommendation.tasks.arguments import as_list


class Value(keras.losses.Loss):
    """The prediction itself."""

    def call(self, y_true, y_pred):
        return y_pred[:, 0]


class EndOfEpoch(keras.callbacks.Callback):
    """Tells the task weighting that an epoch is over."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.task_weighting.end_epoch()


def with_end_of_epoch(callbacks, model):
    """What `fit` was given, and before it, as it may save, `EndOfEpoch`."""
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [EndOfEpoch(), *as_list(callbacks)]
    # That of an earlier `fit` has it already.
    if not any(isinstance(c, EndOfEpoch) for c in callbacks.callbacks):
        first = EndOfEpoch()
        first.set_model(model)
        callbacks.callbacks.insert(0, first)
    return callbacks
