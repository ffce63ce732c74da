"""The graph of a `MultiTaskVisionMoE`: tasks part at the first experts."""

import keras
from keras import ops

from keras_moe import losses as losses_lib
from keras_moe.checks import is_int
from keras_moe.losses.importance_loss import ImportanceLoss
from keras_moe.routers.task_router import TaskRouter
from keras_moe.routers.top_k_router import TopKRouter
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.layers.encoder_block import EncoderBlock
from keras_moe.vision.layers.patch_embedding import PatchEmbedding
from keras_moe.vision.models.backbone import drop_path_of
from keras_moe.vision.models.moe_blocks import per_block
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
    routed = _routed_by(a, x)
    # One tensor until the first block in which tasks part.
    tokens = [x]
    for i in range(a["num_layers"]):
        block = EncoderBlock(
            a["num_heads"],
            moe.get(i) or _dense(a),
            qk_norm=a["qk_norm"],
            layer_norm_epsilon=a["layer_norm_epsilon"],
            dropout=a["dropout"],
            attention_dropout=a["attention_dropout"],
            drop_path=drop_path_of(a, i),
            dtype=a["dtype"],
            name=f"block_{i}",
        )
        if i in moe:
            tokens = tokens * (len(routed) // len(tokens))
            tokens = [
                block(x, **kwargs)
                for x, kwargs in zip(tokens, routed, strict=True)
            ]
        else:
            tokens = [block(x) for x in tokens]
    tokens = tokens * (len(routed) // len(tokens))
    if a["final_norm"]:
        norm = keras.layers.LayerNormalization(
            epsilon=a["layer_norm_epsilon"], dtype=a["dtype"], name="norm"
        )
        tokens = [norm(x) for x in tokens]
    return {
        task: _head(a, task, head)(_pooled(x, a["pooling"]))
        for (task, head), x in zip(a["tasks"].items(), tokens, strict=True)
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
        "losses": [*importance, *losses_lib.get(a["losses"])],
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
    """For each task, what a block with experts is called with besides."""
    number = len(a["tasks"])
    zeros = ops.zeros_like(x[:, 0, 0], dtype="int32")
    if a["router"] == "per_task":
        return [{"context": zeros + task} for task in range(number)]
    layers = (
        keras.layers.Dense(
            a["task_dim"], "gelu", dtype=a["dtype"], name="task_vector_1"
        ),
        keras.layers.Dense(
            a["task_dim"], dtype=a["dtype"], name="task_vector_2"
        ),
        keras.layers.LayerNormalization(
            epsilon=a["layer_norm_epsilon"],
            dtype=a["dtype"],
            name="task_vector_norm",
        ),
    )
    found = []
    for task in range(number):
        vector = ops.one_hot(zeros + task, number)
        for layer in layers:
            vector = layer(vector)
        found.append({"router_condition": vector})
    return found


def _dense(a):
    return VisionMLP(
        a["mlp_dim"],
        a["activation"],
        a["dropout"],
        dtype=a["dtype"],
        name="mlp",
    )


def _pooled(x, pooling):
    if pooling == "token":
        return x[:, 0]
    return x if pooling is None else ops.mean(x[:, 1:], axis=1)


def _head(a, task, head):
    if is_int(head):
        return keras.layers.Dense(head, dtype=a["dtype"], name=f"{task}_head")
    return head
