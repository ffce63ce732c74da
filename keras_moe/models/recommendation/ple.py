import keras

from keras_moe.layers.multi_gate_moe import MultiGateMoE
from keras_moe.models.multi_task.task_spec import check_tasks
from keras_moe.models.recommendation.gated_levels import GatedLevels
from keras_moe.models.recommendation.gated_levels import split_level_arguments
from keras_moe.models.recommendation.recommender import Recommender
from keras_moe.ops.checks import check_int


@keras.saving.register_keras_serializable("keras_moe")
class PLE(Recommender):
    """Levels of experts, each task's own and shared ones (PLE).

    In each level the gate of a task mixes its own experts and the shared ones,
    which read what the gate of this task, or of the shared unit, gave in the
    level before. The shared gate sees all experts; the last level has none.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: What makes a vector of the features: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer called with the dict of
            inputs.
        num_levels: int. Number of levels. Defaults to `2`.
        num_shared_experts: int. Shared experts in each level. Defaults to `4`.
        num_task_experts: int, or a sequence with an int for each task. Each
            task's own experts in each level. Defaults to `4`.
        expert_units: Sequence of ints. Widths of the layers of each expert, in
            all levels. Defaults to `(16,)`.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`. Defaults to
            `"towers"`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`.
        **kwargs: Further arguments of `keras_moe.layers.MultiGateMoE`, for
            all levels, and `name` and `trainable` of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.PLE(["click", "buy"], features)
    >>> sorted(model.gate_weights(features.encode(data), level=0))
    ['buy', 'click', 'shared']

    Reference:

    - [Tang et al., 2020](https://doi.org/10.1145/3383313.3412236)
    """

    def __init__(
        self,
        tasks,
        embedding,
        num_levels=2,
        num_shared_experts=4,
        num_task_experts=4,
        expert_units=(16,),
        heads="towers",
        inputs=None,
        **kwargs,
    ):
        check_int("num_levels", num_levels, 1)
        tasks = check_tasks(tasks)
        options, kwargs = split_level_arguments(kwargs)
        levels = [
            MultiGateMoE(
                len(tasks),
                expert_units,
                num_shared_experts,
                num_task_experts,
                output_shared=i < num_levels - 1,
                return_gates=True,
                name=f"level_{i}",
                **options,
            )
            for i in range(num_levels)
        ]
        super().__init__(
            tasks,
            embedding,
            GatedLevels(tasks, levels),
            heads,
            inputs,
            arguments={
                "num_levels": num_levels,
                "num_shared_experts": num_shared_experts,
                "num_task_experts": num_task_experts,
                "expert_units": expert_units,
                **options,
            },
            **kwargs,
        )
