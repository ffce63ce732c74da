"""Arguments of a model that it hands to its layers, and names of tasks."""

import inspect

from keras_moe.recommendation.tasks.task_spec import TaskSpec
from keras_moe.recommendation.tasks.task_spec import as_tasks


def split_arguments(layer_class, kwargs, fixed, flat=()):
    """`(arguments of the layer, arguments of keras.Model)`.

    Args:
        layer_class: Class of a layer.
        kwargs: Dict of arguments.
        fixed: Names of arguments of the layer that the model itself sets.
        flat: Names of arguments that the layer takes as `**kwargs`.

    Raises:
        ValueError: If an argument is of neither.
    """
    parameters = inspect.signature(layer_class.__init__).parameters
    known = {*parameters, *flat} - {"self", "kwargs", "name", *fixed}
    wrong = sorted(set(kwargs) - known - {"name", "trainable"})
    if wrong:
        raise ValueError(
            "Besides its own arguments the model takes these of "
            f"{layer_class.__name__}: {sorted(known)}. Received: {wrong}"
        )
    options = {key: kwargs[key] for key in kwargs if key in known}
    return options, {key: kwargs[key] for key in kwargs if key not in known}


def without_towers(tasks):
    """`as_tasks`, where a name stands for a binary task without a tower.

    For models whose trunk ends in the towers of the tasks.
    """
    return as_tasks(
        [
            TaskSpec(task, tower_units=()) if isinstance(task, str) else task
            for task in ([tasks] if _is_one(tasks) else tasks)
        ]
    )


def in_a_chain(tasks):
    """`as_tasks`, where names alone are a chain of sample spaces."""
    if _is_one(tasks) or not all(isinstance(task, str) for task in tasks):
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
