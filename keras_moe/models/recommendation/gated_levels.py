"""Trunks of one or more levels of experts under gates."""

import inspect

from keras_moe.layers.multi_gate_moe import MultiGateMoE

# What belongs to the trunk's structure is set by the model.
_STRUCTURE = {
    "num_tasks",
    "num_shared_experts",
    "num_task_experts",
    "output_shared",
    "return_gates",
    "kwargs",
}
LEVEL_ARGUMENTS = (
    set(inspect.signature(MultiGateMoE.__init__).parameters)
    - _STRUCTURE
    - {"self"}
)


class GatedLevels:
    """A trunk of `MultiGateMoE` levels that keeps their gates.

    Args:
        tasks: Tuple of `TaskSpec`.
        levels: List of layers with `return_gates=True`. The first reads the
            features, each other what the one before gives.
    """

    def __init__(self, tasks, levels):
        self.units = [*(task.name for task in tasks), "shared"]
        self.levels = levels
        self.gates = []

    def __call__(self, x):
        for level in self.levels:
            x, gates = level(x)
            units = self.units[: level.num_gates]
            self.gates.append({u: gates[:, i] for i, u in enumerate(units)})
        return x


def split_level_arguments(kwargs):
    """`(arguments of each MultiGateMoE, arguments of the model)`."""
    level = {k: v for k, v in kwargs.items() if k in LEVEL_ARGUMENTS}
    return level, {k: v for k, v in kwargs.items() if k not in level}
