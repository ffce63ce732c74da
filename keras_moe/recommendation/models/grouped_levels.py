"""The trunk of HoME."""

import numpy as np
from keras import ops

from keras_moe.checks import as_ints
from keras_moe.checks import check_int
from keras_moe.recommendation.gates.multi_gate_moe import MultiGateMoE
from keras_moe.recommendation.models.gated_levels import by_unit
from keras_moe.recommendation.models.gated_levels import check_no_shared
from keras_moe.recommendation.models.gated_levels import options_of_level
from keras_moe.recommendation.models.gated_levels import units_of_levels


class GroupedLevels:
    """A level with experts of groups of tasks, then one with experts of tasks.

    Args:
        tasks: Tuple of `TaskSpec`.
        groups: List of lists of names of tasks.
        num_shared_experts, num_group_experts, num_task_experts, expert_units:
            As for `keras_moe.models.HoME`.
        options: Dict of arguments of both `MultiGateMoE`.
    """

    def __init__(
        self,
        tasks,
        groups,
        num_shared_experts,
        num_group_experts,
        num_task_experts,
        expert_units,
        options,
    ):
        check_no_shared(tasks)
        check_int("num_shared_experts", num_shared_experts, 0)
        of_groups = as_ints("num_group_experts", num_group_experts, len(groups))
        of_tasks = as_ints("num_task_experts", num_task_experts, len(tasks))
        self.tasks = [task.name for task in tasks]
        self.groups = [f"group_{i}" for i in range(len(groups))]
        # The group of each task.
        self.places = [
            next(i for i, group in enumerate(groups) if name in group)
            for name in self.tasks
        ]
        self.gates = []
        first, second = units_of_levels(expert_units, 2)
        self.group_level = MultiGateMoE(
            len(groups),
            first,
            num_shared_experts,
            of_groups,
            output_shared=True,
            return_gates=True,
            name="group_level",
            **options_of_level(options, 0),
        )
        # The group output that each expert of the second level reads. For the
        # layer, the experts of groups are shared experts.
        slots = [
            *np.repeat(self.places, of_tasks).tolist(),
            *np.repeat(np.arange(len(groups)), of_groups).tolist(),
            *[len(groups)] * num_shared_experts,
        ]
        self.num_slots = len(groups) + int(num_shared_experts > 0)
        self.task_level = MultiGateMoE(
            len(tasks),
            second,
            sum(of_groups) + num_shared_experts,
            of_tasks,
            visibility=self._visibility(slots, of_tasks),
            expert_slots=slots,
            return_gates=True,
            name="task_level",
            **options_of_level(options, 1),
        )

    def _visibility(self, slots, of_tasks):
        """`(T, E)`: its own experts, its group's and the shared ones."""
        own = np.repeat(np.arange(len(of_tasks)), of_tasks)
        slots, above = np.array(slots), np.zeros(len(slots), "bool")
        above[len(own) :] = True
        rows = []
        for task, place in enumerate(self.places):
            row = above & ((slots == place) | (slots == len(self.groups)))
            row[: len(own)] = own == task
            rows.append(row.astype("int32").tolist())
        return rows

    def __call__(self, x):
        z, gates = self.group_level(x)
        self.gates.append(by_unit(gates, [*self.groups, "shared"]))
        own = ops.stack([z[:, place] for place in self.places], axis=1)
        shared = ops.repeat(z[:, -1:], len(self.tasks), axis=1)
        reads = ops.concatenate([own, shared], axis=-1)
        y, gates = self.task_level(z[:, : self.num_slots], reads)
        self.gates.append(by_unit(gates, self.tasks))
        return y


def as_groups(groups, tasks):
    """A list of lists of names of tasks."""
    names = [task.name for task in tasks]
    if groups is None:
        return [[name] for name in names]
    is_nested = isinstance(groups, (list, tuple)) and all(
        isinstance(group, (list, tuple))
        and group
        and all(isinstance(name, str) for name in group)
        for group in groups
    )
    groups = [list(group) for group in groups] if is_nested else groups
    if not is_nested or sorted(sum(groups, [])) != sorted(names):
        raise ValueError(
            "`groups` must be sequences of names of tasks, in which each task "
            f"occurs once. Received: groups={groups!r}, tasks={names}"
        )
    return groups
