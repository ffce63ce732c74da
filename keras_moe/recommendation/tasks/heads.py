"""Heads: from the trunk's output for a task to its prediction."""

import keras
from keras import ops

from keras_moe.checks import check_at_least
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.recommendation.features.feature import layer_name
from keras_moe.recommendation.layers.aitm_transfer import AITMTransfer
from keras_moe.recommendation.tasks.order_penalty import OrderPenalty


def towers(features, tasks, logits=None):
    """Gives each task a tower of its own.

    Args:
        features: List of tensors `(B, O)`, one a task.
        tasks: Sequence of `TaskSpec`.
        logits: Dict of tensors `(B, output_dim)` by task to add to the logits.
            Defaults to `None`.

    Returns:
        Dict of predictions by task. The last layer of a tower has the name of
        the task; the names of its other layers begin with `<task>_`.
    """
    return {
        task.name: _prediction(task, _tower(task, x), task.name, logits)
        for task, x in zip(tasks, features, strict=True)
    }


def esmm(features, tasks, logits=None):
    """Towers, and products along the sample spaces (ESMM).

    ```
    p[t] = sigmoid(tower[t](x[t])) * p[sample space of t]
    ```

    A task predicts its probability in the entire space ("clicked and bought").
    The layer `<task>_conditional` gives its own factor ("bought if clicked").
    Tasks with a sample space must be binary.

    Args:
        features: As in `towers`.
        tasks: As in `towers`.
        logits: As in `towers`.

    Returns:
        Dict of predictions by task.

    Raises:
        ValueError: If no task has a sample space, or one with a sample space
            is not binary.
    """
    for task in tasks:
        if task.sample_space is not None and task.type != "binary":
            raise ValueError(
                "Heads 'esmm' multiply probabilities, so a task with a "
                f"`sample_space` must be binary. Received: {task!r}"
            )
    if not any(task.sample_space for task in tasks):
        raise ValueError(
            "Heads 'esmm' need a task with a `sample_space`. "
            f"Received: tasks={list(tasks)}"
        )
    own = {}
    for task, x in zip(tasks, features, strict=True):
        inside = task.sample_space is not None
        name = f"{task.name}_conditional" if inside else task.name
        own[task.name] = _prediction(task, _tower(task, x), name, logits)
    by_name, whole = {task.name: task for task in tasks}, {}

    def probability(name):
        space = by_name[name].sample_space
        if name not in whole:
            whole[name] = own[name]
            if space is not None:
                whole[name] = keras.layers.Multiply(name=name, dtype="float32")(
                    [probability(space), own[name]]
                )
        return whole[name]

    return {task.name: probability(task.name) for task in tasks}


@keras.saving.register_keras_serializable("keras_moe")
class AITMHeads:
    """Towers of consecutive tasks; each passes information to the next.

    ```
    z = transfer(hidden layers of all towers (B, T, D)) (B, T, D)
    ```

    The predictions are made from `z`. The tasks are in the order in which their
    events happen. All towers must end in the same width.

    Args:
        transfer: Layer from `(B, T, D)` to `(B, T, D)`. Defaults to `None`: a
            `keras_moe.layers.AITMTransfer` with its defaults.
        calibration_weight: float. Weight of the loss
            `mean(max(p[t] - p[t - 1], 0))`, for binary tasks that are at most
            as probable as the task before. Defaults to `0.0`: no such loss.

    Raises:
        ValueError: If `transfer` is not a layer, or `calibration_weight` is
            negative or not a number; when called, if the towers end in
            different widths, or calibrated tasks are not binary.

    Example:

    >>> features = keras_moe.layers.FeatureEmbedding(
    ...     [keras_moe.layers.Categorical("city", num_ids=10)])
    >>> heads = keras_moe.models.AITMHeads(calibration_weight=0.6)
    >>> model = keras_moe.models.MMoE(["click", "buy"], features, heads=heads)
    >>> "transfer" in [layer.name for layer in model.layers]
    True

    Reference:

    - [Xi et al., 2021](https://arxiv.org/abs/2105.08489)
    """

    def __init__(self, transfer=None, calibration_weight=0.0):
        is_layer = callable(transfer) and not isinstance(transfer, type)
        if transfer is not None and not is_layer:
            raise ValueError(
                "`transfer` must be a layer from (B, T, D) to (B, T, D). "
                f"Received: transfer={transfer!r}"
            )
        check_at_least("calibration_weight", calibration_weight, 0)
        self.transfer = transfer
        self.calibration_weight = calibration_weight

    def __call__(self, features, tasks, logits=None):
        others = [task for task in tasks if task.type != "binary"]
        if self.calibration_weight and others:
            raise ValueError(
                "With a `calibration_weight` all tasks must be binary. "
                f"Received: {others}, "
                f"calibration_weight={self.calibration_weight}"
            )
        hidden = [
            _tower(task, x) for task, x in zip(tasks, features, strict=True)
        ]
        if len({x.shape[-1] for x in hidden}) > 1:
            raise ValueError(
                "Heads 'aitm' need towers that end in the same width. "
                f"Received: { {t.name: t.tower_units for t in tasks} }"
            )
        transfer = self.transfer or AITMTransfer(name="transfer")
        z = transfer(ops.stack(hidden, axis=1))
        before, outputs = None, {}
        for i, task in enumerate(tasks):
            p = _prediction(task, z[:, i], task.name, logits)
            if self.calibration_weight and before is not None:
                p = OrderPenalty(
                    self.calibration_weight, name=f"{task.name}_order"
                )([before, p])
            before = outputs[task.name] = p
        return outputs

    def get_config(self):
        return {
            "transfer": serialize_part(self.transfer),
            "calibration_weight": self.calibration_weight,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        transfer = config.pop("transfer")
        if isinstance(transfer, dict):
            transfer = keras.saving.deserialize_keras_object(transfer)
        return cls(transfer, **config)


def get(identifier):
    """The heads of a name; a function is returned as it is."""
    named = {"towers": towers, "esmm": esmm, "aitm": AITMHeads()}
    if isinstance(identifier, str) and identifier in named:
        return named[identifier]
    # A class, when called, would take the features as its arguments.
    if not callable(identifier) or isinstance(identifier, type):
        raise ValueError(
            f"`heads` must be one of {tuple(named)} or a function `(features, "
            f"tasks) -> outputs`. Received: heads={identifier!r}"
        )
    return identifier


def split_tasks(features, tasks):
    """Splits the output of a trunk into one tensor `(B, O)` for each task.

    Args:
        features: `(B, T, O)`, a list of `T` tensors `(B, O)`, or one tensor
            `(B, O)` for all tasks.
        tasks: Sequence of `TaskSpec`.
    """
    if isinstance(features, (list, tuple)):
        features = list(features)
        if len(features) == len(tasks):
            return features
        received = f"{len(features)} tensors"
    else:
        if len(features.shape) == 2:
            return [features] * len(tasks)
        if len(features.shape) == 3 and features.shape[1] == len(tasks):
            return [features[:, i] for i in range(len(tasks))]
        received = f"shape {tuple(features.shape)}"
    raise ValueError(
        f"A trunk for {len(tasks)} tasks must give as many tensors, or one of "
        f"shape (batch, {len(tasks)}, dim) or (batch, dim). Received: "
        f"{received}"
    )


def _tower(task, x):
    for i, units in enumerate(task.tower_units):
        x = keras.layers.Dense(
            units,
            activation=task.tower_activation,
            name=layer_name(f"{task.name}_tower_{i}"),
        )(x)
        if task.tower_dropout:
            x = keras.layers.Dropout(
                task.tower_dropout, name=f"{task.name}_dropout_{i}"
            )(x)
    return x


def _prediction(task, x, name, logits=None):
    x = keras.layers.Dense(
        task.output_dim, name=layer_name(f"{task.name}_logits")
    )(x)
    if logits is not None:
        x = keras.layers.Add(name=f"{task.name}_joint_logits")(
            [x, logits[task.name]]
        )
    # In float32 under every dtype policy: 0.9999 is 1 in bfloat16.
    return keras.layers.Activation(task.activation, name=name, dtype="float32")(
        x
    )
