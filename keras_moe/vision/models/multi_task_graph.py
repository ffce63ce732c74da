"""The graph of a `MultiTaskVisionMoE`: tasks part at the first experts."""

import keras
from keras import ops

from keras_moe import losses as losses_lib
from keras_moe.checks import is_int
from keras_moe.losses.importance_loss import ImportanceLoss
from keras_moe.losses.routing_loss import RoutingLoss
from keras_moe.moe.foreign_parts import as_loss
from keras_moe.moe.foreign_parts import serialize_loss
from keras_moe.routers.task_router import TaskRouter
from keras_moe.routers.top_k_router import TopKRouter
from keras_moe.vision.layers.patch_embedding import PatchEmbedding
from keras_moe.vision.models.moe_blocks import per_block
from keras_moe.vision.models.vision_backbone import encoder_block
from keras_moe.vision.models.vmoe_layers import moe_of_blocks


def multi_task_graph(a, where, images):
    """The outputs by task.

    Args:
        a: dict. The arguments of the model; its `data_format` is set.
        where: list of ints. The blocks with experts.
        images: KerasTensor.
    """
    embedding = PatchEmbedding(
        a["hidden_dim"],
        a["patch_size"],
        use_class_token=True,
        positions=a["positions"],
        data_format=a["data_format"],
        dtype=a["dtype"],
        name="patch_embedding",
    )
    a["data_format"] = embedding.data_format
    x = embedding(images)
    if a["dropout"]:
        x = keras.layers.Dropout(
            a["dropout"], dtype=a["dtype"], name="embedding_dropout"
        )(x)
    moe = moe_of_blocks(_moe_arguments(a, where), where)
    number, routed, is_shared = len(a["tasks"]), {}, True
    for i in range(a["num_layers"]):
        block = encoder_block(a, i, moe.get(i), a["dtype"])
        if i in moe and is_shared:
            # From here on, each task has a copy of the images: one call of a
            # layer for all, since Keras' stateless calls lose the losses of
            # all calls of a layer but the last.
            x = ops.concatenate([x] * number, axis=0)
            routed, is_shared = _routed_by(a, x), False
        x = block(x, **(routed if i in moe else {}))
    if a["final_norm"]:
        x = keras.layers.LayerNormalization(
            epsilon=a["layer_norm_epsilon"], dtype=a["dtype"], name="norm"
        )(x)
    x = _pooled(x, a["pooling"])
    if is_shared:
        of_tasks = [x] * number
    else:
        x = ops.reshape(x, (number, -1, *x.shape[1:]))
        of_tasks = [x[task] for task in range(number)]
    return {
        task: _head(a, task, head)(x)
        for (task, head), x in zip(a["tasks"].items(), of_tasks, strict=True)
    }


def _moe_arguments(a, where):
    numbers = per_block("num_experts", a["num_experts"], len(where))
    importance = []
    if a["importance_loss_weight"]:
        importance = [
            ImportanceLoss(
                a["importance_loss_weight"], scores="weights", ddof=1
            )
        ]
    return {
        **a,
        "num_experts": numbers,
        "mlp_dim": a["expert_dim"] or a["hidden_dim"],
        "router": [_router(a, number) for number in numbers],
        "top_k": None,
        "router_noise": None,
        "capacity_factor": None,
        "eval_capacity_factor": None,
        "capacity_multiple_of": 1,
        "drop_policy": "position",
        "group_size": None,
        "importance_loss_weight": 0.0,
        "load_loss_weight": 0.0,
        "load_balancing_loss_weight": 0.0,
        "losses": [
            EachTaskLoss(loss, len(a["tasks"]))
            for loss in (*importance, *losses_lib.get(a["losses"]))
        ],
        "num_shared_experts": 0,
    }


def _router(a, num_experts):
    arguments = {
        "top_k": a["top_k"],
        "normalize_weights": False,
        "noise_stddev": a["router_noise"] / num_experts,
        "dtype": a["dtype"],
        "name": "router",
    }
    if a["router"] == "task_vector":
        return TopKRouter(num_experts, **arguments)
    return TaskRouter(num_experts, len(a["tasks"]), **arguments)


def _routed_by(a, x):
    """What blocks with experts are called with besides tokens of all tasks."""
    number = len(a["tasks"])
    ones = ops.ones_like(x[:, 0, 0], dtype="int32")
    places = ops.cumsum(ones) - 1
    ids = places // (ops.sum(ones) // number)
    if a["router"] == "per_task":
        return {"context": ids}
    vector = ops.one_hot(ids, number)
    for name, activation in (("1", "gelu"), ("2", None)):
        vector = keras.layers.Dense(
            a["task_dim"],
            activation,
            dtype=a["dtype"],
            name=f"task_vector_{name}",
        )(vector)
    vector = keras.layers.LayerNormalization(
        epsilon=a["layer_norm_epsilon"],
        dtype=a["dtype"],
        name="task_vector_norm",
    )(vector)
    return {"router_condition": vector}


def _pooled(x, pooling):
    if pooling == "token":
        return x[:, 0]
    return x if pooling is None else ops.mean(x[:, 1:], axis=1)


def _head(a, task, head):
    if is_int(head):
        return keras.layers.Dense(head, dtype=a["dtype"], name=f"{task}_head")
    return head


@keras.saving.register_keras_serializable("keras_moe")
class EachTaskLoss(RoutingLoss):
    """The sum of a loss over tasks, whose tokens are equal parts of all.

    Args:
        loss: A loss, or a function `(routing, mask) -> scalar`.
        num_tasks: int.
    """

    uses_sequences = True
    uses_context = True

    def __init__(self, loss, num_tasks):
        super().__init__(1.0)
        self.loss = as_loss(loss)
        self.num_tasks = num_tasks

    def check_router(self, router):
        self.loss.check_router(router)

    def call(self, routing, mask=None, num_sequences=1, context=None):
        total = 0.0
        for task in range(self.num_tasks):

            def own(values, task=task):
                if values is None:
                    return None
                shape = (self.num_tasks, -1, *values.shape[1:])
                return ops.reshape(values, shape)[task]

            total = total + self.loss(
                type(routing)(*map(own, routing)),
                own(mask),
                num_sequences // self.num_tasks,
                own(context),
            )
        return total

    def get_config(self):
        return {"loss": serialize_loss(self.loss), "num_tasks": self.num_tasks}

    @classmethod
    def from_config(cls, config):
        loss = keras.saving.deserialize_keras_object(config["loss"])
        return cls(loss, config["num_tasks"])
