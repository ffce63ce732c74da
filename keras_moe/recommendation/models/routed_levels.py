"""The trunk of SNR."""

from keras_moe.checks import as_ints
from keras_moe.checks import as_keras_object
from keras_moe.checks import as_units
from keras_moe.checks import check_int
from keras_moe.checks import check_rate
from keras_moe.ops import activations
from keras_moe.recommendation.layers.sub_network_routing import (
    SubNetworkRouting,
)
from keras_moe.recommendation.models.gated_levels import options_of_level
from keras_moe.recommendation.models.gated_levels import units_of_levels
from keras_moe.stacked.draws import own_seed
from keras_moe.stacked.stacked_mlp import StackedMLP


class RoutedLevels:
    """Levels of experts, each followed by a `SubNetworkRouting`.

    Args:
        num_tasks: int.
        num_levels, num_experts, expert_units, routing_units,
            expert_activation, expert_dropout: As for `keras_moe.models.SNR`.
        options: Dict of arguments of each `SubNetworkRouting`.
    """

    def __init__(
        self,
        num_tasks,
        num_levels,
        num_experts,
        expert_units,
        routing_units,
        expert_activation,
        expert_dropout,
        options,
    ):
        check_int("num_levels", num_levels, 1)
        numbers = as_ints("num_experts", num_experts, num_levels, minimum=1)
        units = units_of_levels(expert_units, num_levels)
        if routing_units is not None:
            check_int("routing_units", routing_units, 1)
        check_rate("expert_dropout", expert_dropout)
        activation = as_keras_object(
            "expert_activation", activations.get, expert_activation
        )
        seed = options.get("seed")
        self.levels = []
        readers = [*numbers[1:], num_tasks]
        for i, (number, reading) in enumerate(
            zip(numbers, readers, strict=True)
        ):
            experts = StackedMLP(
                number,
                as_units("expert_units", units[i]),
                activation=activation,
                dropout=expert_dropout,
                seed=own_seed(seed, num_levels + i),
                name=f"experts_{i}",
            )
            routing = SubNetworkRouting(
                reading,
                routing_units,
                name=f"routing_{i}",
                **options_of_level(options, i),
            )
            self.levels += [experts, routing]

    def __call__(self, x):
        for level in self.levels:
            x = level(x)
        return x
