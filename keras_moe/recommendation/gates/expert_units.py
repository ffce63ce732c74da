"""Which unit of a `MultiGateMoE` owns an expert, and which gate sees it."""

import numpy as np

from keras_moe.checks import as_ints
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of

VISIBILITIES = ("own_and_shared", "all")


class ExpertUnits:
    """Experts of the tasks in turn, then the shared ones.

    Attributes:
        owners: `(E,)` int array. The unit of each expert: its task, or
            `num_tasks` for the shared ones.
        visible, own: `(G, E)` boolean arrays. A gate for each task, and with
            `output_shared` one of the shared unit.
        has_several_somewhere: bool. Whether any unit owns more than one.
        foreign: `(G, E)` boolean array. The experts of other tasks that the
            gate of a task sees.
    """

    def __init__(
        self,
        num_tasks,
        num_task_experts,
        num_shared_experts,
        visibility,
        shared_sees,
        output_shared,
    ):
        check_int("num_tasks", num_tasks, 1)
        check_int("num_shared_experts", num_shared_experts, 0)
        numbers = as_ints("num_task_experts", num_task_experts, num_tasks)
        check_one_of("shared_sees", shared_sees, ("all", "shared"))
        self.num_tasks = num_tasks
        self.num_gates = num_tasks + int(output_shared)
        self.owners = np.repeat(
            np.arange(num_tasks + 1), [*numbers, num_shared_experts]
        )
        self.num_experts = len(self.owners)
        if not self.num_experts:
            raise ValueError(
                "There must be at least one expert. Received: "
                f"num_task_experts={num_task_experts!r}, "
                f"num_shared_experts={num_shared_experts}"
            )
        self.has_several_somewhere = max(*numbers, num_shared_experts) > 1
        gates = np.arange(self.num_gates)[:, None]
        shared = self.owners == num_tasks
        self.own = self.owners == gates
        if isinstance(visibility, str):
            check_one_of("visibility", visibility, VISIBILITIES)
            self.visible = np.where(
                gates == num_tasks,
                shared | (shared_sees == "all"),
                self.own | shared | (visibility == "all"),
            )
        else:
            self.visible = self._matrix(visibility)
        blind = np.flatnonzero(~self.visible.any(axis=-1)).tolist()
        if blind:
            raise ValueError(
                "Each gate must see an expert, a task's own, shared ones or, "
                "with `visibility`, others. Received no expert for the gates "
                f"{blind}: num_task_experts={num_task_experts!r}, "
                f"num_shared_experts={num_shared_experts}, "
                f"visibility={visibility!r}"
            )
        self.foreign = self.visible & ~self.own & ~shared & (gates < num_tasks)

    def _matrix(self, visibility):
        try:
            matrix = np.array(visibility, "float64")
        except (TypeError, ValueError):
            matrix = np.array(np.nan)
        shape = (self.num_gates, self.num_experts)
        if matrix.shape != shape or not np.isin(matrix, (0, 1)).all():
            raise ValueError(
                f"`visibility` must be one of {VISIBILITIES}, or a matrix of "
                "zeros and ones of the shape (gates, experts), here "
                f"{shape}. Received: visibility={visibility!r}"
            )
        return matrix == 1
