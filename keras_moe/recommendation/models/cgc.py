import keras

from keras_moe.recommendation.models.gated_levels import GatedLevels
from keras_moe.recommendation.models.gated_levels import make_levels
from keras_moe.recommendation.models.gated_levels import split_level_arguments
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.tasks.task_spec import as_tasks


@keras.saving.register_keras_serializable("keras_moe")
class CGC(Recommender):
    """Each task's own experts and shared ones, in one level (CGC).

    ```
    y[t] = tower[t](sum of gate[t][e] * expert[e](x)
                    over the experts e of task t and the shared ones)
    gate[t] = softmax(x @ kernel[t]) over the same experts
    ```

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: Turns the features into a vector: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer that is called with the dict
            of inputs.
        num_shared_experts: int. Experts that all tasks see. Defaults to `4`.
        num_task_experts: int, or a sequence with an int for each task. Each
            task's own experts. Defaults to `4`.
        expert_units: Sequence of ints. Widths of the layers of each expert.
            Defaults to `(16,)`.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`. Defaults to
            `"towers"`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`.
        **kwargs: Further arguments of `keras_moe.layers.MultiGateMoE`
            (`gate_units`, `expert_dropout`, ...), and `name` and `trainable`
            of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.CGC(
    ...     ["click", "buy"], features, num_task_experts=[1, 3])
    >>> model.gate_weights(features.encode(data))["buy"].shape
    (3, 8)

    Reference:

    - [Tang et al., 2020](https://doi.org/10.1145/3383313.3412236)
    """

    def __init__(
        self,
        tasks,
        embedding,
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
            "num_shared_experts": num_shared_experts,
            "num_task_experts": num_task_experts,
            "expert_units": expert_units,
        }
        levels = make_levels(tasks, 1, options=options, **structure)
        super().__init__(
            tasks,
            embedding,
            GatedLevels(tasks, levels),
            heads,
            inputs,
            arguments={**structure, **options},
            **kwargs,
        )
