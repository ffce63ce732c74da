import keras

from keras_moe.recommendation.models.gated_levels import GatedLevels
from keras_moe.recommendation.models.gated_levels import make_levels
from keras_moe.recommendation.models.gated_levels import split_level_arguments
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.tasks.task_spec import as_tasks


@keras.saving.register_keras_serializable("keras_moe")
class AdaTT(Recommender):
    """Levels in which tasks mix all experts, and add their own again (AdaTT).

    ```
    h[0, u] = x                                    for each unit
    h[l, u] = sum over all experts e of gate[l, u][e] * expert[l, e]
              + sum over u's own experts e of residual[l, e] * expert[l, e]
    expert[l, e] = mlp[l, e](h[l - 1, unit of e])
    gate[l, u] = softmax(h[l - 1, u] @ kernel[l, u]) over all experts
    y[t] = tower[t](h[last, t])
    ```

    The `residual` is learned and independent of the input. It is the constant 1
    if no unit has several experts. The units are the tasks (AdaTT-sp). With
    `num_shared_experts` there is one more unit, whose experts are the shared
    ones; it has no gate in the last level.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: Turns the features into a vector: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer that is called with the dict
            of inputs.
        num_levels: int. Number of levels. Defaults to `2`.
        num_shared_experts: int. Experts of the shared unit in each level.
            Defaults to `0`, no shared unit.
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
            all levels (`self_residual=None` leaves the residuals out), and
            `name` and `trainable` of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.AdaTT(
    ...     ["click", "buy"], features, num_task_experts=2)
    >>> model.gate_weights(features.encode(data))["buy"].shape
    (3, 4)

    Reference:

    - [Li et al., 2023](https://arxiv.org/abs/2304.04959)
    """

    def __init__(
        self,
        tasks,
        embedding,
        num_levels=2,
        num_shared_experts=0,
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
        defaults = {"visibility": "all", "self_residual": "weights", **options}
        levels = make_levels(tasks, options=defaults, **structure)
        super().__init__(
            tasks,
            embedding,
            GatedLevels(tasks, levels),
            heads,
            inputs,
            arguments={**structure, **options},
            **kwargs,
        )
