"""Which unit of a `MultiGateMoE` owns each expert, and which gates see it."""

import numpy as np

from keras_moe.checks import as_ints
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of

VISIBILITIES = ("own_and_shared", "all")


class ExpertUnits:
    """Who owns each expert, and which gates see it.

    The units are the tasks and the shared unit, which owns the experts that no
    task owns. The experts are ordered by unit, the shared ones last.

    Args:
        num_tasks, num_shared_experts, num_task_experts, visibility,
            shared_sees, output_shared, stop_cross_task_gradients: As for
            `MultiGateMoE`.

    Attributes:
        owners: `(E,)` int array. The unit of each expert: its task, or
            `num_tasks` for the shared ones.
        visible, own: `(G, E)` boolean arrays. There is a gate for each task,
            and with `output_shared` one for the shared unit.
        stopped: `(G, E)` boolean array, or `None`. Where a gate sees an expert
            of another task and sends it no gradient.
        has_several_somewhere: bool. Whether any unit owns several experts.
    """

    def __init__(
        self,
        num_tasks,
        num_shared_experts,
        num_task_experts,
        visibility,
        shared_sees,
        output_shared,
        stop_cross_task_gradients,
    ):
        check_int("num_tasks", num_tasks, 1)
        check_int("num_shared_experts", num_shared_experts, 0)
        numbers = as_ints("num_task_experts", num_task_experts, num_tasks)
        check_one_of("shared_sees", shared_sees, ("all", "shared"))
        check_bool("output_shared", output_shared)
        check_bool("stop_cross_task_gradients", stop_cross_task_gradients)
        if stop_cross_task_gradients and visibility == "own_and_shared":
            raise ValueError(
                "With `stop_cross_task_gradients`, tasks must see experts of "
                "other tasks. Received: stop_cross_task_gradients=True, "
                f"visibility={visibility!r}"
            )
        self.num_tasks = num_tasks
        self.num_shared_experts = num_shared_experts
        self.num_task_experts = num_task_experts
        self.shared_sees = shared_sees
        self.output_shared = output_shared
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
                "Each gate must see an expert: its task's own, a "
                "shared one or, with `visibility`, another. Received no expert "
                f"for the gates {blind}: "
                f"num_task_experts={num_task_experts!r}, "
                f"num_shared_experts={num_shared_experts}, "
                f"visibility={visibility!r}"
            )
        foreign = self.visible & ~self.own & ~shared & (gates < num_tasks)
        self.stopped = foreign if stop_cross_task_gradients else None
        self.visibility = visibility
        if not isinstance(visibility, str):
            self.visibility = self.visible.astype("int32").tolist()

    def get_config(self):
        return {
            "num_tasks": self.num_tasks,
            "num_shared_experts": self.num_shared_experts,
            "num_task_experts": self.num_task_experts,
            "visibility": self.visibility,
            "shared_sees": self.shared_sees,
            "output_shared": self.output_shared,
            "stop_cross_task_gradients": self.stopped is not None,
        }

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
