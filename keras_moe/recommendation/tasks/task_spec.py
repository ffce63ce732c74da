import keras

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.checks import check_name
from keras_moe.checks import check_number
from keras_moe.checks import check_one_of
from keras_moe.checks import check_ordered
from keras_moe.checks import check_rate

TYPES = ("binary", "regression", "multiclass")


@keras.saving.register_keras_serializable("keras_moe")
class TaskSpec:
    """What one task of a multi-task model predicts, and how it is trained.

    A label is missing where it is NaN: it then counts in no loss and in no
    metric of the task.

    Args:
        name: str. Name of the task, its prediction, its label and its logs.
        type: `"binary"` (a probability, labels from 0 to 1), `"regression"` (a
            number) or `"multiclass"` (probabilities of `num_classes` classes,
            labels from 0 to `num_classes - 1`). Defaults to `"binary"`.
        num_classes: int. Number of classes, for `"multiclass"` alone. Defaults
            to `None`.
        tower_units: List or tuple of ints. Widths of the hidden layers of the
            task's own tower; empty for no tower. Defaults to `(64,)`.
        tower_activation: Activation of the hidden layers. Defaults to `"relu"`.
        tower_dropout: float. Dropout rate after each hidden layer. Defaults to
            `0.0`.
        weight: float. Factor of the task's loss. Defaults to `1.0`.
        class_weights: Sequence of floats, one for each class: factors of the
            losses of its examples. A binary task has two, for the labels 0 and
            1. Defaults to `None`: all are 1.
        sample_space: str. Name of another binary task. This task has a label
            only where the other label is 1: only what was clicked can be
            bought. How the loss treats other examples depends on the heads, see
            `keras_moe.models.MultiTaskModel`. Defaults to `None`: this task may
            have a label in every example.
        missing_value: float. A label that means "missing", as NaN does, for
            dtypes without NaN. Defaults to `None`.

    Raises:
        ValueError: If an argument is out of range or of the wrong kind, or
            arguments do not fit together.

    Example:

    >>> tasks = [
    ...     keras_moe.models.TaskSpec("click", tower_units=(16,)),
    ...     keras_moe.models.TaskSpec("buy", sample_space="click"),
    ...     keras_moe.models.TaskSpec("stars", "multiclass", num_classes=5),
    ... ]
    >>> [task.output_dim for task in tasks]
    [1, 1, 5]
    """

    def __init__(
        self,
        name,
        type="binary",
        num_classes=None,
        tower_units=(64,),
        tower_activation="relu",
        tower_dropout=0.0,
        weight=1.0,
        class_weights=None,
        sample_space=None,
        missing_value=None,
    ):
        check_name("name", name)
        check_one_of("type", type, TYPES)
        if type == "multiclass":
            check_int("num_classes", num_classes, 2)
        elif num_classes is not None:
            raise ValueError(
                "`num_classes` is for type='multiclass'. "
                f"Received: num_classes={num_classes!r}, type={type!r}"
            )
        if not isinstance(tower_units, (list, tuple)):
            raise ValueError(
                "`tower_units` must be a sequence of ints. "
                f"Received: tower_units={tower_units!r}"
            )
        for units in tower_units:
            check_int("tower_units", units, 1)
        check_rate("tower_dropout", tower_dropout)
        check_at_least("weight", weight, 0)
        if sample_space is not None:
            check_name("sample_space", sample_space)
        if missing_value is not None:
            check_number("missing_value", missing_value)
        self.name = name
        self.type = type
        self.num_classes = num_classes
        self.tower_units = tuple(tower_units)
        self.tower_activation = as_keras_object(
            "tower_activation", keras.activations.get, tower_activation
        )
        self.tower_dropout = tower_dropout
        self.weight = weight
        self.class_weights = self._as_class_weights(class_weights)
        self.sample_space = sample_space
        self.missing_value = missing_value

    def _as_class_weights(self, class_weights):
        if class_weights is None:
            return None
        if self.type == "regression":
            raise ValueError(
                "`class_weights` must be None: a regression has no classes. "
                f"Received: class_weights={class_weights!r}"
            )
        # Of `{0: 1.0, 1: 5.0}`, as in `fit`, only the keys would be read.
        check_ordered("class_weights", class_weights)
        class_weights = list(class_weights)
        num_classes = self.num_classes or 2
        if len(class_weights) != num_classes:
            raise ValueError(
                f"`class_weights` must be {num_classes} numbers, one a class. "
                f"Received: class_weights={class_weights!r}"
            )
        for weight in class_weights:
            check_at_least("class_weights", weight, 0)
        return tuple(float(weight) for weight in class_weights)

    @property
    def output_dim(self):
        """Width of the prediction."""
        return self.num_classes or 1

    @property
    def activation(self):
        """Name of the activation from logits to predictions."""
        return {
            "binary": "sigmoid",
            "regression": "linear",
            "multiclass": "softmax",
        }[self.type]

    def get_config(self):
        return {
            "name": self.name,
            "type": self.type,
            "num_classes": self.num_classes,
            "tower_units": self.tower_units,
            "tower_activation": keras.activations.serialize(
                self.tower_activation
            ),
            "tower_dropout": self.tower_dropout,
            "weight": self.weight,
            "class_weights": self.class_weights,
            "sample_space": self.sample_space,
            "missing_value": self.missing_value,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        return f"TaskSpec({self.name!r}, type={self.type!r})"


def as_tasks(tasks):
    """A tuple of `TaskSpec`s, from specs, configs or names of binary tasks.

    Raises:
        ValueError: If there is no task, two tasks have the same name, or a
            sample space is not another binary task or leads back to the task.
    """
    if isinstance(tasks, (str, TaskSpec, dict)):
        tasks = [tasks]
    check_ordered("tasks", tasks)
    specs = []
    for task in tasks:
        if isinstance(task, str):
            task = TaskSpec(task)
        elif isinstance(task, dict):
            task = as_keras_object(
                "tasks", keras.saving.deserialize_keras_object, task
            )
        if not isinstance(task, TaskSpec):
            raise ValueError(
                "`tasks` must be made of keras_moe.models.TaskSpec. "
                f"Received: tasks={tasks!r}"
            )
        specs.append(task)
    by_name = {task.name: task for task in specs}
    if not specs or len(by_name) < len(specs):
        raise ValueError(
            "`tasks` must be at least one, and have different names. "
            f"Received: tasks={[task.name for task in specs]}"
        )
    for task in specs:
        seen = [task.name]
        while by_name[seen[-1]].sample_space is not None:
            space = by_name[seen[-1]].sample_space
            if space not in by_name or by_name[space].type != "binary":
                raise ValueError(
                    "`sample_space` must be the name of another binary task. "
                    f"Received: sample_space={space!r} of task "
                    f"{seen[-1]!r}, tasks={list(by_name)}"
                )
            if space in seen:
                raise ValueError(
                    "A `sample_space` must not lead back to its own task. "
                    f"Received: {' -> '.join([*seen, space])}"
                )
            seen.append(space)
    return tuple(specs)


def without_towers(tasks):
    """As `as_tasks`; names become binary tasks without a tower.

    For models whose trunk already contains the towers.
    """
    if _is_one(tasks):
        tasks = [tasks]
    check_ordered("tasks", tasks)
    return as_tasks(
        [
            TaskSpec(task, tower_units=()) if isinstance(task, str) else task
            for task in tasks
        ]
    )


def in_a_chain(tasks):
    """As `as_tasks`; names become a chain.

    Each task is then defined on the positive examples of the one before it.
    """
    if _is_one(tasks):
        return as_tasks(tasks)
    check_ordered("tasks", tasks)
    tasks = list(tasks)
    if not all(isinstance(task, str) for task in tasks):
        return as_tasks(tasks)
    spaces = [None, *tasks]
    return as_tasks(
        [
            TaskSpec(name, sample_space=space)
            for name, space in zip(tasks, spaces, strict=False)
        ]
    )


def _is_one(tasks):
    return isinstance(tasks, (str, TaskSpec, dict))
