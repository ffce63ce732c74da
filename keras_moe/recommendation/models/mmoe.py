import keras

from keras_moe.checks import check_int
from keras_moe.recommendation.gates.multi_gate_moe import MultiGateMoE
from keras_moe.recommendation.models.gated_levels import GatedLevels
from keras_moe.recommendation.models.gated_levels import split_level_arguments
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.tasks.task_spec import as_tasks


@keras.saving.register_keras_serializable("keras_moe")
class MMoE(Recommender):
    """Experts that all tasks share, mixed by one gate per task (MMoE).

    ```
    y[t] = tower[t](sum_e softmax(x @ gate[t])[e] * expert[e](x))
    ```

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: Turns the features into a vector: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer that is called with the dict
            of inputs.
        num_experts: int. Number of experts. Defaults to `8`.
        expert_units: Sequence of ints. Widths of the layers of each expert.
            Defaults to `(16,)`.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`. Defaults to
            `"towers"`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`.
        **kwargs: Further arguments of `keras_moe.layers.MultiGateMoE`
            (`gate_units`, `gate_activation="dselect_k"`, `expert_dropout`,
            ...), and `name` and `trainable` of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.MMoE(["click", "buy"], features, num_experts=4)
    >>> model.gate_weights(features.encode(data))["buy"].shape
    (3, 4)

    Reference:

    - [Ma et al., 2018](https://doi.org/10.1145/3219819.3220007)
    """

    def __init__(
        self,
        tasks,
        embedding,
        num_experts=8,
        expert_units=(16,),
        heads="towers",
        inputs=None,
        **kwargs,
    ):
        tasks = as_tasks(tasks)
        check_int("num_experts", num_experts, 1)
        options, kwargs = split_level_arguments(kwargs)
        level = MultiGateMoE(
            len(tasks),
            expert_units,
            num_shared_experts=num_experts,
            return_gates=True,
            name="experts",
            **options,
        )
        super().__init__(
            tasks,
            embedding,
            GatedLevels(tasks, [level]),
            heads,
            inputs,
            arguments={
                "num_experts": num_experts,
                "expert_units": expert_units,
                **options,
            },
            **kwargs,
        )
