import keras

from keras_moe.recommendation.models.gated_levels import GatedLevels
from keras_moe.recommendation.models.gated_levels import make_levels
from keras_moe.recommendation.models.gated_levels import split_level_arguments
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.models.task_embeddings import TaskEmbeddings
from keras_moe.recommendation.tasks.task_spec import as_tasks


@keras.saving.register_keras_serializable("keras_moe")
class STEM(Recommender):
    """An embedding of the features for each task, and a shared one (STEM).

    ```
    h[0, t] = embedding[t](features),  h[0, "shared"] = embedding(features)
    h[l, t] = sum over all experts e of gate[l, t][e] * expert[l, e]
    h[l, "shared"] = the same                      but in the last level
    expert[l, e] = mlp[l, e](h[l - 1, unit of e])
    gate[l, t] = softmax((h[l - 1, t] + h[l - 1, "shared"]) @ kernel[l, t])
    gate[l, "shared"] = softmax(h[l - 1, "shared"] @ kernel[l, "shared"])
    y[t] = tower[t](h[last, t])
    ```

    Tasks send no gradient through `h[l, t]` into the experts of other tasks.
    With one level, the embedding of a task learns from this task alone; with
    several, the shared unit also passes on gradients of other tasks.

    Each task has a copy of the embedding, called `<its name>_<task>`, with its
    own initial values; the given embedding is the shared one. All read the same
    inputs and encode data alike. The tables take `T + 1` times the memory.

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: A `keras_moe.layers.FeatureEmbedding`, or any layer with a
            config that turns the dict of inputs into vectors. It must not be
            adapted later.
        num_levels: int. Number of levels. Defaults to `1`.
        num_shared_experts: int. Shared experts in each level. Defaults to `4`.
        num_task_experts: int, or a sequence with an int for each task. Each
            task's own experts in each level. Defaults to `4`.
        expert_units: Sequence of ints. Widths of the layers of each expert, in
            all levels; or a sequence of ints for each level.
            Defaults to `(16,)`.
        stop_cross_task_gradients: bool. Whether to stop the gradients from a
            task to the experts of other tasks. Defaults to `True`.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`. Defaults to
            `"towers"`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`.
        **kwargs: Further arguments of `keras_moe.layers.MultiGateMoE`, for
            all levels, and `name` and `trainable` of the model.

    Raises:
        ValueError: If arguments are out of range or do not fit together, or
            `embedding` is not a layer that can be copied.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.STEM(["click", "buy"], features)
    >>> [x.name for x in model.layers if isinstance(x, type(features))]
    ['features_click', 'features_buy', 'features']
    >>> inputs = model.get_layer("features").encode(data)
    >>> model.predict(inputs, verbose=0)["buy"].shape
    (3, 1)

    Reference:

    - [Su et al., 2023](https://arxiv.org/abs/2308.13537)
    """

    def __init__(
        self,
        tasks,
        embedding,
        num_levels=1,
        num_shared_experts=4,
        num_task_experts=4,
        expert_units=(16,),
        stop_cross_task_gradients=True,
        heads="towers",
        inputs=None,
        **kwargs,
    ):
        tasks = as_tasks(tasks)
        options, kwargs = split_level_arguments(kwargs, ("gate_input",))
        structure = {
            "num_levels": num_levels,
            "num_shared_experts": num_shared_experts,
            "num_task_experts": num_task_experts,
            "expert_units": expert_units,
        }
        options["stop_cross_task_gradients"] = stop_cross_task_gradients
        defaults = {"visibility": "all", "gate_input": "slot_plus_shared"}
        levels = make_levels(
            tasks, options={**defaults, **options}, **structure
        )
        super().__init__(
            tasks,
            TaskEmbeddings(embedding, tasks),
            GatedLevels(tasks, levels, num_slots=len(tasks) + 1),
            heads,
            inputs,
            arguments={"embedding": embedding, **structure, **options},
            **kwargs,
        )
