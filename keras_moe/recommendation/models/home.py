import keras

from keras_moe.recommendation.models.gated_levels import split_level_arguments
from keras_moe.recommendation.models.grouped_levels import GroupedLevels
from keras_moe.recommendation.models.grouped_levels import as_groups
from keras_moe.recommendation.models.recommender import Recommender
from keras_moe.recommendation.tasks.task_spec import as_tasks


@keras.saving.register_keras_serializable("keras_moe")
class HoME(Recommender):
    """Experts of groups of tasks, then experts of tasks (HoME).

    ```
    z[u] = mix[0, u](x)                        for each group, and "shared"
    y[t] = tower[t](mix[1, t](z))
    mix[l, u] = sum of (gate[l, u][e] + self[l, u][e]) * expert[l, e]
    expert[l, e] = swish(norm(dense[l, e](r * 2 sigmoid(r @ down @ up))))
    ```

    where `gate` is a softmax over all experts that unit `u` sees, and `self` a
    softmax over the unit's own experts, or a sigmoid if it has one. In the
    first level a group sees its own experts and the shared ones, and "shared"
    sees all. In the second a task sees its own experts, the experts of its
    group and the shared ones. In the first level an expert reads `r = x`. In
    the second, the experts of a group and of its tasks read the `z` of the
    group, and the shared experts read `z["shared"]`; the gates of a task read
    both, side by side.

    The paper describes the two levels with their groups, the normalized experts
    with swish, the low-rank gates on the features and the gates on a unit's own
    experts. It leaves open what the experts of the second level read (some
    public code gives them both `z`), how many gates on the features there are
    (here one for each expert), and whether shared experts belong to a group
    (here they do not).

    Args:
        tasks: Sequence of `keras_moe.models.TaskSpec`, or names of binary
            tasks.
        embedding: Turns the features into a vector: a
            `keras_moe.layers.FeatureEmbedding`, an adapted
            `keras.utils.FeatureSpace`, or a layer that is called with the dict
            of inputs.
        groups: Sequence of sequences of names of tasks, in which each task
            occurs once. Defaults to `None`, a group for each task.
        num_shared_experts: int. Shared experts in each level. Defaults to `2`.
        num_group_experts: int, or a sequence with an int for each group. The
            experts of each group in each level. Defaults to `2`.
        num_task_experts: int, or a sequence with an int for each task. Each
            task's own experts, in the second level. Defaults to `2`.
        expert_units: Sequence of ints. Widths of the layers of each expert, in
            both levels; or a sequence of ints for each. Defaults to `(16,)`.
        feature_gate_rank: int, or `None`. Number of columns of `down`. With
            `None` there are no gates on features. Defaults to `8`.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`. Defaults to
            `"towers"`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`.
        **kwargs: Further arguments of `keras_moe.layers.MultiGateMoE`, for
            both levels, and `name` and `trainable` of the model. Three have
            other defaults: `expert_normalization="batch"`,
            `expert_activation="silu"` and `self_residual="gates"`.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, 25.0]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(data)
    >>> model = keras_moe.models.HoME(
    ...     ["click", "buy", "like"], features, [["click", "buy"], ["like"]])
    >>> inputs = features.encode(data)
    >>> sorted(model.gate_weights(inputs, level=0))
    ['group_0', 'group_1', 'shared']
    >>> model.gate_weights(inputs)["like"].shape
    (3, 12)

    Reference:

    - [Wang et al., 2024](https://arxiv.org/abs/2408.05430)
    """

    def __init__(
        self,
        tasks,
        embedding,
        groups=None,
        num_shared_experts=2,
        num_group_experts=2,
        num_task_experts=2,
        expert_units=(16,),
        feature_gate_rank=8,
        heads="towers",
        inputs=None,
        **kwargs,
    ):
        tasks = as_tasks(tasks)
        groups = as_groups(groups, tasks)
        fixed = ("visibility", "shared_sees", "expert_slots", "gate_input")
        options, kwargs = split_level_arguments(kwargs, fixed)
        options["feature_gate_rank"] = feature_gate_rank
        defaults = {
            "expert_normalization": "batch",
            "expert_activation": "silu",
            "self_residual": "gates",
        }
        structure = {
            "groups": groups,
            "num_shared_experts": num_shared_experts,
            "num_group_experts": num_group_experts,
            "num_task_experts": num_task_experts,
            "expert_units": expert_units,
        }
        super().__init__(
            tasks,
            embedding,
            GroupedLevels(tasks, options={**defaults, **options}, **structure),
            heads,
            inputs,
            arguments={**structure, **options},
            **kwargs,
        )
