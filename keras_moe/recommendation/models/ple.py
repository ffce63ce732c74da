import keras

from keras_moe.recommendation.models.gated_levels import GatedLevels
from keras_moe.recommendation.models.gated_levels import make_levels
from keras_moe.recommendation.models.gated_levels import split_level_arguments
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.tasks.task_spec import as_tasks


@keras.saving.register_keras_serializable("keras_moe")
class PLE(Recommender):
    """Levels of experts: each task's own, and shared ones (PLE).

    ```
    h[0, u] = x                                    for each task and "shared"
    h[l, t] = sum of gate[l, t][e] * expert[l, e](h[l - 1, unit of e])
              over the experts e of task t and the shared ones
    h[l, "shared"] = the same over all experts     but in the last level
    gate[l, u] = softmax(h[l - 1, u] @ kernel[l, u]) over the same experts
    y[t] = tower[t](h[last, t])
    ```

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: Turns the features into a vector: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer that is called with the dict
            of inputs.
        num_levels: int. Number of levels. Defaults to `2`.
        num_shared_experts: int. Shared experts in each level. Defaults to `4`.
        num_task_experts: int, or a sequence with an int for each task. Each
            task's own experts in each level. Defaults to `4`.
        expert_units: Sequence of ints. Widths of the layers of each expert, in
            all levels; or a sequence of ints for each level.
            Defaults to `(16,)`.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`. Defaults to
            `"towers"`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`.
        **kwargs: Further arguments of `keras_moe.layers.MultiGateMoE`, for
            all levels, and `name` and `trainable` of the model. With
            `shared_sees="shared"` the shared gate sees only shared experts,
            as in some public code.

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
        tasks = as_tasks(tasks)
        options, kwargs = split_level_arguments(kwargs)
        structure = {
            "num_levels": num_levels,
            "num_shared_experts": num_shared_experts,
            "num_task_experts": num_task_experts,
            "expert_units": expert_units,
        }
        levels = make_levels(tasks, options=options, **structure)
        super().__init__(
            tasks,
            embedding,
            GatedLevels(tasks, levels),
            heads,
            inputs,
            arguments={**structure, **options},
            **kwargs,
        )
