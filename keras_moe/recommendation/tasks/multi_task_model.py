import contextlib

import keras

from keras_moe.checks import check_bool
from keras_moe.recommendation.metrics.labelled import LabelledMean
from keras_moe.recommendation.tasks import labels as labels_lib
from keras_moe.recommendation.tasks.gradients import shared_variable_ids
from keras_moe.recommendation.tasks.task_spec import as_tasks
from keras_moe.recommendation.tasks.task_training import TaskTraining
from keras_moe.recommendation.tasks.task_training import with_end_of_epoch
from keras_moe.recommendation.tasks.training_arguments import by_task
from keras_moe.recommendation.tasks.training_arguments import check_compile
from keras_moe.recommendation.tasks.training_arguments import check_data
from keras_moe.recommendation.tasks.training_arguments import check_graph
from keras_moe.recommendation.tasks.training_arguments import labels_by_task
from keras_moe.recommendation.tasks.training_arguments import masked_metrics
from keras_moe.recommendation.tasks.weighting import (
    named_weightings as weightings,
)


@keras.saving.register_keras_serializable("keras_moe")
class MultiTaskModel(TaskTraining, keras.Model):
    """A functional model with one prediction for each of several tasks.

    A dict of features goes in, a dict of predictions `{task: (B, O)}` comes
    out, and the loss combines the losses of the tasks:

    ```
    loss[t] = mean over the examples with a label of task t
    loss    = task_weighting(weight[t] * loss[t] for all t) + added losses
    ```

    **Missing labels.** An example whose label is NaN counts in neither loss nor
    metrics of the task. A task without any label in a batch adds 0 to the loss
    and has no gradient. The logs of a task without any label in an epoch are
    NaN. `fit` and `evaluate` check that labels in NumPy arrays fit the type of
    their task, and `fit` that each task has one. In other data, a label that
    does not fit (`-1` for a binary task) makes the loss NaN, or PyTorch and
    TensorFlow raise. Labels may be a pandas frame.

    **Sample spaces.** The label of a task with a `sample_space` counts only in
    examples in which the label of that other task is 1, and the prediction is
    conditional on it. With `entire_space=True` (for heads that multiply
    probabilities, as in ESMM) labels count in all examples: where the label of
    the sample space is 0, the label is 0, whatever `y` holds.

    **Inputs.** Entries of the dict that the model does not use are ignored; a
    missing feature is an error.

    **Several devices.** As in Keras: on JAX with `keras.distribution`, all
    numbers equal a single device's; under a TensorFlow strategy the loss
    is the mean of the replicas' losses, and only static weighting is possible.

    **Logs.** They have `loss`, `<task>_<metric>` and `<task>_loss`, which is
    the mean over all labels of the epoch, without the weight of the task. In
    evaluation, `loss` is the sum of all `weight[t] * <t>_loss` and the mean of
    added losses. It depends on neither the task weighting nor the batches, so
    that it compares models. It is NaN if no task has a label. In training,
    `loss` is the mean over batches of the loss that was minimized.

    **Copies.** `type(model).from_config(model.get_config())` makes a copy;
    `keras.models.clone_model` makes a plain functional model without tasks.

    Args:
        inputs: Dict of `keras.Input` by their names, or a single one.
        outputs: Dict of tensors `(batch, output_dim)` by task.
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        entire_space: bool. Whether predictions hold for the entire space, even
            if their tasks have a sample space. Defaults to `False`.
        **kwargs: Arguments of `keras.Model`.

    Raises:
        ValueError: If an argument is of the wrong kind, `outputs` do not match
            the tasks, or the key of an input is not its name.

    Example:

    >>> inputs = {"x": keras.Input((8,), name="x")}
    >>> outputs = {
    ...     name: keras.layers.Dense(1, activation="sigmoid")(inputs["x"])
    ...     for name in ("click", "buy")
    ... }
    >>> model = keras_moe.models.MultiTaskModel(
    ...     inputs, outputs, tasks=["click", "buy"])
    >>> model.compile("adam", task_weighting="uncertainty")
    """

    def __init__(self, inputs, outputs, tasks, entire_space=False, **kwargs):
        tasks = as_tasks(tasks)
        check_bool("entire_space", entire_space)
        check_graph(inputs, outputs, tasks)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.tasks = tasks
        self.entire_space = bool(entire_space)
        self._graph = (inputs, outputs)
        self._task_losses = {
            t.name: LabelledMean(name=f"{t.name}_loss") for t in tasks
        }
        self._weightings = []
        self._gram = None
        self._shared_ids = frozenset()
        # An evaluation's loss is the mean over all examples, not over batches.
        # (No task's metric has such a name.)
        self._added_loss = LabelledMean(name="_added")
        self._is_evaluating = False

    def call(self, inputs, training=None, mask=None):
        expected = self._graph[0]
        if isinstance(inputs, dict) and isinstance(expected, dict):
            missing = sorted(set(expected) - set(inputs))
            if missing:
                raise ValueError(
                    f"Features are missing from the inputs: {missing}. "
                    f"Received: {sorted(inputs)}"
                )
            # The dict may hold columns that are not features, as user ids.
            inputs = {name: inputs[name] for name in expected}
        return super().call(inputs, training=training, mask=mask)

    def compile(
        self,
        optimizer="rmsprop",
        loss="auto",
        metrics="auto",
        task_weighting="static",
        weighted_metrics=None,
        **kwargs,
    ):
        """Configures the training.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: `"auto"`, or a dict of losses by task. `"auto"`, also for
                tasks left out of the dict, means binary cross-entropy, squared
                error or sparse categorical cross-entropy. A loss is a name or
                object of Keras, or a function
                `(y_true (B, 1), y_pred (B, O)) -> (B,)`; labels are float32.
                Defaults to `"auto"`.
            metrics: `"auto"` (`BinaryAUC`, `RootMeanSquaredError` or
                `SparseCategoricalAccuracy`), `None`, or a dict by task of a
                metric or a list of metrics, which may include `"auto"`. Missing
                labels do not count. Defaults to `"auto"`.
            task_weighting: `"static"`, `"uncertainty"`, `"dwa"`, `"rlw"`,
                `"gls"`, `"famo"`, `"gradnorm"`, `"pcgrad"`, or a
                `keras_moe.models.TaskWeighting`. Defaults to `"static"`, the
                sum.
            weighted_metrics: As `metrics`, with sample weights. Defaults to
                `None`.
            **kwargs: As in `keras.Model.compile`, but without `loss_weights`:
                see `TaskSpec.weight`.

        Raises:
            ValueError: If an argument is not one of these, or `task_weighting`
                does not work under the model's TensorFlow strategy.
        """
        weighting = weightings.get(task_weighting)
        check_compile(self, weighting, kwargs.pop("loss_weights", None))
        self._losses_by_task = {
            t.name: labels_lib.resolve_loss(
                t, by_task("loss", loss, self.tasks).get(t.name)
            )
            for t in self.tasks
        }
        weighting.set_tasks(self.tasks)
        # The list drops the variables of an earlier weighting. PyTorch resets
        # the gradients of this one's variables only if it is an attribute.
        self._weightings.clear()
        self._weightings.append(weighting)
        self.task_weighting = weighting
        super().compile(
            optimizer=optimizer,
            loss=None,
            metrics=masked_metrics("metrics", metrics, self.tasks),
            weighted_metrics=masked_metrics(
                "weighted_metrics", weighted_metrics, self.tasks
            ),
            **kwargs,
        )
        config = {
            "loss": loss,
            "metrics": metrics,
            "weighted_metrics": weighted_metrics,
            "task_weighting": weighting,
        }
        # A function, because Keras would track metrics in a dict again.
        self._task_compile_config = lambda: config
        if weighting.uses_gradients:
            self._shared_ids = shared_variable_ids(self)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        **kwargs,
    ):
        """As `keras.Model.fit`; NumPy arrays are checked first."""
        y = labels_by_task(y)
        check_data(self, x, y)
        if isinstance(y, dict) and kwargs.get("class_weight") is not None:
            raise ValueError(
                "The weights of a task's classes are `TaskSpec.class_weights`. "
                f"Received: class_weight={kwargs['class_weight']!r}"
            )
        validation = kwargs.get("validation_data")
        if isinstance(validation, (tuple, list)) and len(validation) > 1:
            x_val, y_val, *weights = validation
            y_val = labels_by_task(y_val)
            check_data(self, x_val, y_val, needs_labels=False)
            kwargs["validation_data"] = (x_val, y_val, *weights)
        return super().fit(
            x=x,
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=with_end_of_epoch(callbacks, self),
            **kwargs,
        )

    def evaluate(self, x=None, y=None, *args, **kwargs):
        """As `keras.Model.evaluate`; NumPy arrays are checked first."""
        y = labels_by_task(y)
        check_data(self, x, y, needs_labels=False)
        with self._evaluation():
            return super().evaluate(x, y, *args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        with self._evaluation():
            return super().test_on_batch(*args, **kwargs)

    @contextlib.contextmanager
    def _evaluation(self):
        before, self._is_evaluating = self._is_evaluating, True
        try:
            yield
        finally:
            self._is_evaluating = before

    def predict(self, x, *args, **kwargs):
        """As `keras.Model.predict`; NumPy arrays are checked first."""
        check_data(self, x)
        return super().predict(x, *args, **kwargs)

    def get_config(self):
        inputs, outputs = self._graph
        graph = keras.Model(_plain(inputs), _plain(outputs), name=self.name)
        tasks = [keras.saving.serialize_keras_object(t) for t in self.tasks]
        return {
            "graph": graph.get_config(),
            "single_input": not isinstance(inputs, dict),
            "tasks": tasks,
            "entire_space": self.entire_space,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        if "graph" not in config:  # A subclass saves its arguments.
            return cls(**config)
        config = dict(config)
        graph = keras.Model.from_config(config.pop("graph"), custom_objects)
        tasks = as_tasks(config.pop("tasks"))
        inputs = {tensor.name: tensor for tensor in graph.inputs}
        if config.pop("single_input"):
            inputs = graph.inputs[0]
        # Keras keeps the outputs of a dict in the order of their keys.
        names = sorted(task.name for task in tasks)
        outputs = dict(zip(names, graph.outputs, strict=True))
        return MultiTaskModel(inputs, outputs, tasks, name=graph.name, **config)

    def get_compile_config(self):
        if not self.compiled:
            return {}
        config = super().get_compile_config()
        config.update(
            keras.saving.serialize_keras_object(self._task_compile_config())
        )
        return config

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)


def _plain(structure):
    return dict(structure) if isinstance(structure, dict) else structure
