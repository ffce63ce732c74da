"""Trunks of one or more levels of experts under gates."""

import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_int
from keras_moe.checks import check_seed
from keras_moe.checks import check_several
from keras_moe.checks import is_int
from keras_moe.recommendation.gates.multi_gate_moe import MultiGateMoE
from keras_moe.recommendation.gates.multi_gate_parts import SHORTHANDS
from keras_moe.recommendation.gates.task_gates import TaskGates
from keras_moe.recommendation.models.layer_arguments import split_arguments
from keras_moe.stacked.draws import own_draws
from keras_moe.stacked.draws import own_seed
from keras_moe.stacked.draws import with_seeds

# The arguments of each level that the model sets.
_STRUCTURE = (
    *("num_tasks", "num_shared_experts", "num_task_experts"),
    *("output_shared", "return_gates"),
)


class GatedLevels:
    """A trunk of `MultiGateMoE` levels that keeps their gates.

    Args:
        tasks: Tuple of `TaskSpec`.
        levels: List of layers with `return_gates=True`. The first reads the
            features, each other one the outputs of the level before.
        num_slots: int, or `None`. Into how many slots of equal width the
            features are split. Defaults to `None`: all units read all features.
    """

    def __init__(self, tasks, levels, num_slots=None):
        self.units = [*(task.name for task in tasks), "shared"]
        self.levels = levels
        self.num_slots = num_slots
        self.gates = []
        check_no_shared(tasks)

    def __call__(self, x):
        if self.num_slots is not None:
            width = x.shape[-1] // self.num_slots
            x = ops.reshape(x, (-1, self.num_slots, width))
        for level in self.levels:
            x, gates = level(x)
            self.gates.append(by_unit(gates, self.units))
        return x


def by_unit(gates, units):
    """`(B, G, E)` -> a dict of `(B, E)` by the first `G` units."""
    return {u: gates[:, i] for i, u in enumerate(units[: gates.shape[1]])}


def check_no_shared(tasks):
    if any(task.name == "shared" for task in tasks):
        raise ValueError(
            "No task can have the name 'shared': it stands for the shared "
            f"experts. Received: tasks={[t.name for t in tasks]}"
        )


def make_levels(
    tasks,
    num_levels,
    expert_units,
    num_shared_experts,
    num_task_experts,
    options,
):
    """Levels as PLE has them, `MultiGateMoE` with `return_gates=True`.

    Args:
        tasks: Tuple of `TaskSpec`.
        num_levels: int.
        expert_units: Sequence of ints, or a sequence of ints for each level.
        num_shared_experts, num_task_experts: As for `MultiGateMoE`.
        options: Dict of its other arguments, the same for all levels except for
            the seeds.
    """
    check_int("num_levels", num_levels, 1)
    check_int("num_shared_experts", num_shared_experts, 0)
    if num_levels > 1 and isinstance(options.get("experts"), (list, tuple)):
        raise ValueError(
            "With several levels `experts` must be one layer, which is copied. "
            f"Received: experts={options['experts']!r}, num_levels={num_levels}"
        )
    has_shared = num_shared_experts > 0
    has_shared |= options.get("gate_input") == "slot_plus_shared"
    return [
        MultiGateMoE(
            len(tasks),
            units,
            num_shared_experts,
            num_task_experts,
            output_shared=has_shared and i < num_levels - 1,
            return_gates=True,
            name=f"level_{i}",
            **options_of_level(options, i),
        )
        for i, units in enumerate(units_of_levels(expert_units, num_levels))
    ]


def split_level_arguments(kwargs, fixed=()):
    """`(arguments of each MultiGateMoE, arguments of the model)`.

    Args:
        kwargs: Dict of arguments.
        fixed: Names of further arguments that the model itself sets.
    """
    return split_arguments(
        MultiGateMoE, kwargs, (*_STRUCTURE, *fixed), SHORTHANDS
    )


def units_of_levels(expert_units, num_levels):
    """The widths of the layers of an expert, level by level."""
    if is_int(expert_units):
        return [expert_units] * num_levels
    check_several("expert_units", expert_units)
    if all(map(is_int, expert_units)):
        return [expert_units] * num_levels
    if len(expert_units) != num_levels:
        raise ValueError(
            "`expert_units` must be a sequence of ints, or a sequence of ints "
            f"for each of the {num_levels} levels. "
            f"Received: expert_units={expert_units!r}"
        )
    return list(expert_units)


def options_of_level(options, number):
    """Copies the options, with new parts and seeds for a level."""
    options = dict(options)
    if "seed" in options:
        check_seed("seed", options["seed"])
        options["seed"] = own_seed(options["seed"], number)
    for name in ("kernel_initializer", "gate_initializer"):
        if name in options:
            initializer = as_keras_object(
                name, keras.initializers.get, options[name]
            )
            options[name] = own_draws(initializer, number)
    for name in ("experts", "gates"):
        part = options.get(name)
        # Other experts are layers that each level copies itself.
        if isinstance(part, TaskGates) or hasattr(part, "num_networks"):
            options[name] = _copy(part, number)
    return options


def _copy(part, number):
    """A new part from the config of the part, with other seeds."""
    return type(part).from_config(with_seeds(part.get_config(), number))


class OneGate:
    """A trunk of one `MultiGateMoE` with a single gate for all tasks.

    Args:
        tasks: Tuple of `TaskSpec`.
        level: Layer with `num_tasks=1` and `return_gates=True`.
    """

    def __init__(self, tasks, level):
        self.tasks = tasks
        self.level = level
        self.gates = []

    def __call__(self, x):
        y, gates = self.level(x)
        gate = gates[:, 0]
        self.gates.append({task.name: gate for task in self.tasks})
        return y[:, 0]
