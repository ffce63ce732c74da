"""What the names of tasks stand for in models that make more of them."""

from keras_moe.models.multi_task.task_spec import TaskSpec
from keras_moe.models.multi_task.task_spec import check_tasks


def without_towers(tasks):
    """`check_tasks`, where a name stands for a binary task without a tower.

    For models whose trunk ends in the towers of the tasks.
    """
    return check_tasks(
        [
            TaskSpec(task, tower_units=()) if isinstance(task, str) else task
            for task in ([tasks] if _is_one(tasks) else tasks)
        ]
    )


def in_a_chain(tasks):
    """`check_tasks`, where names alone are a chain of sample spaces."""
    if _is_one(tasks) or not all(isinstance(task, str) for task in tasks):
        return check_tasks(tasks)
    spaces = [None, *tasks]
    return check_tasks(
        [
            TaskSpec(name, sample_space=space)
            for name, space in zip(tasks, spaces, strict=False)
        ]
    )


def _is_one(tasks):
    return isinstance(tasks, (str, TaskSpec, dict))
