import keras
from keras import ops

from keras_moe import backend
from keras_moe.recommendation.metrics.labelled import LabelledMean


class NextItemModel(keras.Model):
    """A model trained to predict ids of items, where label 0 is padding."""

    def __init__(self, inputs, outputs, **kwargs):
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self._item_loss = LabelledMean(name="_item_loss")
        self._added_loss = LabelledMean(name="_added_loss")
        self._counts_labels = False

    def compile(self, optimizer="rmsprop", loss="auto", **kwargs):
        """As `keras.Model.compile`.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: Defaults to `"auto"`, the mean cross-entropy over the
                positions whose label is not 0. In `evaluate` and in the logs of
                `fit` all these positions count the same, whatever the batch
                size; without labels the loss is NaN. Keras averages any other
                loss over batches.
            **kwargs: As in `keras.Model.compile`.
        """
        next_item_loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=0
        )
        if isinstance(loss, str) and loss == "auto":
            loss = next_item_loss
        # A loaded model receives the loss object instead of "auto".
        self._counts_labels = (
            type(loss) is type(next_item_loss)
            and loss.get_config() == next_item_loss.get_config()
        )
        super().compile(optimizer, loss, **kwargs)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if sample_weight is not None:
            # Weights are per sequence or per position. Keras on PyTorch
            # multiplies them in place by a mask (B, L), and on TensorFlow
            # their rank may be unknown.
            size = ops.shape(y_pred)[0]
            sample_weight = ops.reshape(sample_weight, (size, -1))
            ones = ops.ones_like(y_pred[:, :, 0])
            sample_weight = ones * ops.cast(sample_weight, ones.dtype)
        total = super().compute_loss(x, y, y_pred, sample_weight, training)
        if self._counts_labels:
            added = sum((ops.sum(loss) for loss in self.losses), 0.0)
            added = ops.cast(added, "float32")
            # Keras divides a loss by the number of replicas.
            whole = ops.cast(total, "float32") * backend.num_replicas(self)
            self._item_loss.update_state(
                ops.stop_gradient(whole - added),
                ops.sum(ops.cast(ops.not_equal(y, 0), "float32")),
            )
            self._added_loss.update_state(
                ops.stop_gradient(added),
                ops.cast(ops.shape(y_pred)[0], "float32"),
            )
        return total

    def get_metrics_result(self):
        logs = super().get_metrics_result()
        loss = logs.pop(self._item_loss.name)
        added = logs.pop(self._added_loss.name)
        if self._counts_labels:
            # Keras averages over batches: a batch with few labels would count
            # as much as a full one.
            logs["loss"] = loss + added
        return logs

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)
