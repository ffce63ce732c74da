"""How a `MultiTaskModel` is trained: its steps, its loss and its logs."""

import math

import keras
from keras import ops

from keras_moe import backend
from keras_moe.recommendation.tasks import labels as labels_lib
from keras_moe.recommendation.tasks.gradients import gradient_products
from keras_moe.recommendation.tasks.training_arguments import as_list


class Value(keras.losses.Loss):
    """A loss that is the prediction itself."""

    def call(self, y_true, y_pred):
        return y_pred[:, 0]


class EndOfEpoch(keras.callbacks.Callback):
    """Tells the task weighting that an epoch is over."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.task_weighting.end_epoch()


def with_end_of_epoch(callbacks, model):
    """Puts `EndOfEpoch` before the callbacks of `fit`, which may save."""
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [EndOfEpoch(), *as_list(callbacks)]
    # A list from an earlier `fit` already has it.
    if not any(isinstance(c, EndOfEpoch) for c in callbacks.callbacks):
        first = EndOfEpoch()
        first.set_model(model)
        callbacks.callbacks.insert(0, first)
    return callbacks


class TaskTraining:
    """The part of a `MultiTaskModel` that computes losses and logs.

    It stands before `keras.Model` among the base classes, and needs the
    attributes that the model's constructor and `compile` set.
    """

    def train_step(self, *args):
        # `(state, data)` on JAX, `(data,)` elsewhere.
        if not self.task_weighting.uses_gradients:
            return super().train_step(*args)
        self._gram = gradient_products(self, *args)
        try:
            return super().train_step(*args)
        finally:
            self._gram = None

    def weighted_losses(self, y, y_pred, sample_weight=None):
        """The losses for the task weighting, and their parts.

        Returns:
            The losses times the weights of their tasks `(T,)`, a list of the
            losses and a list of the numbers of labels.
        """
        given = (y, y_pred, sample_weight, self.entire_space)
        losses, counts = labels_lib.task_losses(
            self.tasks, self._losses_by_task, *given
        )
        weights = [task.weight for task in self.tasks]
        weighted = ops.stack(losses) * ops.convert_to_tensor(weights, "float32")
        return weighted, losses, counts

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        weighted, losses, counts = self.weighted_losses(
            y, y_pred, sample_weight
        )
        for task, loss, count in zip(self.tasks, losses, counts, strict=True):
            self._task_losses[task.name].update_state(
                ops.stop_gradient(loss), count
            )
        if training:
            # A task of weight 0 counts as one without labels.
            present = [
                ops.cast(count > 0, "float32") * float(task.weight > 0)
                for task, count in zip(self.tasks, counts, strict=True)
            ]
            present = ops.stack(present)
            total = self.task_weighting.combine(weighted, present, self._gram)
        else:
            total = ops.sum(weighted)
        # A Keras loss is divided by the number of replicas, because replicas
        # sum their gradients.
        total = Value()(ops.zeros((1, 1)), ops.reshape(total, (1, 1)))
        if self.losses:
            added = super().compute_loss(x, y, y_pred, sample_weight, training)
            added = ops.cast(added, "float32")
            size = ops.shape(y_pred[self.tasks[0].name])[0]
            self._added_loss.update_state(
                ops.stop_gradient(added) * backend.num_replicas(self),
                ops.cast(size, "float32"),
            )
            total = total + added
        return total

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        labels = labels_lib.labels_of(self.tasks, y, self.entire_space)
        if sample_weight is not None:
            sample_weight = labels_lib.weights_of(self.tasks, sample_weight)
        return super().compute_metrics(x, labels, y_pred, sample_weight)

    def get_metrics_result(self):
        logs = super().get_metrics_result()
        added = logs.pop(self._added_loss.name)
        if self._is_evaluating:
            # A mean over batches would count batches without labels too.
            counted = self._added_loss.count > 0
            total, labels = ops.where(counted, added, 0.0), 0.0
            for task in self.tasks:
                count = ops.convert_to_tensor(
                    self._task_losses[task.name].count
                )
                loss = task.weight * logs[f"{task.name}_loss"]
                total = total + ops.where(count > 0, loss, 0.0)
                labels = labels + count
            logs["loss"] = ops.where(labels > 0, total, math.nan)
        return logs
