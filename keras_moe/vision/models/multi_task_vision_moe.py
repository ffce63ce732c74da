import keras

from keras_moe.checks import check_at_least
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_name
from keras_moe.checks import check_one_of
from keras_moe.checks import is_int
from keras_moe.moe.part_arguments import default_name
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.vision.models.image_backbone import BlockModel
from keras_moe.vision.models.image_backbone import as_dtype
from keras_moe.vision.models.image_backbone import as_image_shape
from keras_moe.vision.models.image_backbone import lists_of
from keras_moe.vision.models.moe_blocks import moe_block_indices
from keras_moe.vision.models.multi_task_graph import multi_task_graph
from keras_moe.vision.models.vision_backbone import check_encoder
from keras_moe.vision.models.vision_presets import M3VIT

ROUTERS = ("per_task", "task_vector")
POOLINGS = ("token", "gap", None)


@keras.saving.register_keras_serializable("keras_moe")
class MultiTaskVisionMoE(BlockModel):
    """A vision transformer for several tasks, with experts for all (M3ViT).

    ```
    x = [class_token, patches of the images @ kernel + bias] + positions
    for each task t, for each block:
        x = x + attention(layer_norm(x))
        x = x + MoE(layer_norm(x), routed for t)      or a dense feed-forward
        y[t] = head[t](pooling(layer_norm(x)))        after the last block
    ```

    All tasks have the same experts, and each routes tokens to them in its own
    way. Blocks before the first one with experts are computed once; each task
    computes the rest for itself, and has a balancing loss of its own.

    It is trained as any Keras model, with a dict of labels. Where labels are
    missing, or tasks are to be weighted, put a
    `keras_moe.models.MultiTaskModel` of `TaskSpec`s around it, see the example.

    Args:
        tasks: Dict by the tasks' names of an int, the width of a dense layer
            that gives logits, or a layer, the head, such as
            `keras.layers.Dense(5, "softmax")`.
        image_shape: Three ints, in the order of `data_format`.
        patch_size: int, or two; must divide the images.
        num_layers: int. Blocks.
        num_heads: int. Attention heads; must divide `hidden_dim`.
        hidden_dim: int. Width of the tokens.
        mlp_dim: int. Width of the hidden layer of dense feed-forwards.
        num_experts: int, or a list with one for each block with experts.
            Defaults to `16`.
        expert_dim: int. Width of the hidden layer of experts. Defaults to
            `None`, which is `hidden_dim`.
        moe_layers: Which blocks have experts: `"every_2"` the odd ones,
            counted from 0, `"last_n"` the last n of the odd ones, or a list of
            ints. Defaults to `"every_2"`.
        router: `"per_task"`, a router for each task
            (`keras_moe.routers.TaskRouter`), or `"task_vector"`, one router
            that sees a learned vector of the task beside each token. Defaults
            to `"per_task"`.
        task_dim: int. Width of the vectors of tasks. Defaults to `64`.
        top_k: int. Experts per token. Defaults to `4`.
        router_noise: float. Width of the noise on the logits in training, times
            the number of experts. Defaults to `0.0`.
        importance_loss_weight: float. Weight of
            `keras_moe.losses.ImportanceLoss`. Defaults to `1e-2`.
        losses: Further losses of each block, as for `keras_moe.layers.MoE`.
            Defaults to `None`.
        pooling: What heads get: `"token"` the class token, `"gap"` the mean
            over the patches, `None` all tokens, as for dense prediction.
            Defaults to `"token"`.
        final_norm: bool. Whether there is a layer norm after the last block.
            Defaults to `True`.
        activation: Activation of experts and dense feed-forwards. Defaults to
            `"gelu"`.
        expert_dropout, dropout, attention_dropout, drop_path: As for
            `keras_moe.models.VMoEBackbone`. Default to `0.0`.
        positions: As for `keras_moe.layers.PatchEmbedding`. Defaults to
            `"learned"`.
        qk_norm: bool. Whether attention normalizes queries and keys. Defaults
            to `False`.
        layer_norm_epsilon: float. Defaults to `1e-6`.
        data_format, dtype, **kwargs: As for `keras_moe.models.VMoEBackbone`.

    Input shape:
        `(batch, *image_shape)`

    Output shape:
        A dict by task of what the heads give.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> model = keras_moe.models.MultiTaskVisionMoE(
    ...     {"digit": 10, "is_bold": keras.layers.Dense(1, "sigmoid")},
    ...     image_shape=(16, 16, 1), patch_size=8, num_layers=2, num_heads=2,
    ...     hidden_dim=8, mlp_dim=16, num_experts=4, top_k=2,
    ... )
    >>> outputs = model(np.zeros((3, 16, 16, 1)))
    >>> {task: tuple(y.shape) for task, y in outputs.items()}
    {'digit': (3, 10), 'is_bold': (3, 1)}

    With tasks as recommendation models have them, whose labels may be missing:

    ```python
    tasks = [
        keras_moe.models.TaskSpec("digit", "multiclass", num_classes=10),
        keras_moe.models.TaskSpec("is_bold"),
    ]
    heads = {
        task.name: keras.layers.Dense(task.output_dim, task.activation)
        for task in tasks
    }
    net = keras_moe.models.MultiTaskVisionMoE(heads, ...)
    model = keras_moe.models.MultiTaskModel(net.input, net.output, tasks)
    model.compile("adam", task_weighting="uncertainty")
    ```

    Reference:

    - [Liang et al., 2022](https://arxiv.org/abs/2210.14793), section 3.2
    - [Chen et al., 2023](https://openaccess.thecvf.com/content/ICCV2023/html/Chen_AdaMV-MoE_Adaptive_Multi-Task_Vision_Mixture-of-Experts_ICCV_2023_paper.html),
      section 3 (AdaMV-MoE, of which this is the form with a fixed `top_k`)
    """

    presets = M3VIT

    def __init__(
        self,
        tasks,
        image_shape,
        patch_size,
        num_layers,
        num_heads,
        hidden_dim,
        mlp_dim,
        num_experts=16,
        expert_dim=None,
        moe_layers="every_2",
        router="per_task",
        task_dim=64,
        top_k=4,
        router_noise=0.0,
        importance_loss_weight=1e-2,
        losses=None,
        pooling="token",
        final_norm=True,
        activation="gelu",
        expert_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        positions="learned",
        qk_norm=False,
        layer_norm_epsilon=1e-6,
        data_format=None,
        dtype=None,
        *,
        name=None,
        **kwargs,
    ):
        arguments = {
            key: value
            for key, value in locals().items()
            if key not in ("self", "name", "kwargs", "__class__")
        }
        a = lists_of(arguments)
        a["dtype"] = as_dtype(dtype)
        check_encoder(a)
        _check_tasks(tasks)
        check_one_of("router", router, ROUTERS)
        check_one_of("pooling", pooling, POOLINGS)
        check_bool("final_norm", final_norm)
        check_int("task_dim", task_dim, 1)
        check_at_least("router_noise", router_noise, 0)
        if expert_dim is not None:
            check_int("expert_dim", expert_dim, 1)
        where = moe_block_indices(
            moe_layers, num_layers, list(range(1, num_layers, 2))
        )
        images = keras.Input(as_image_shape(image_shape), name="images")
        outputs = multi_task_graph(a, where, images)
        super().__init__(
            a,
            images,
            outputs,
            name=name or default_name("multi_task_vision_moe"),
            **kwargs,
        )

    def get_config(self):
        tasks = {
            name: head if is_int(head) else serialize_part(head)
            for name, head in self._arguments()["tasks"].items()
        }
        return {**super().get_config(), "tasks": tasks}


def _check_tasks(tasks):
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(
            "`tasks` must be a dict by the names of tasks, at least one. "
            f"Received: tasks={tasks!r}"
        )
    for name, head in tasks.items():
        check_name("tasks", name)
        if not isinstance(head, keras.layers.Layer):
            check_int(f"tasks[{name!r}]", head, 1)
    heads = [id(head) for head in tasks.values() if not is_int(head)]
    if len(set(heads)) < len(heads):
        raise ValueError(
            "Each of `tasks` must have a layer of its own. Received: "
            f"tasks={tasks!r}"
        )
