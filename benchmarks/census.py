"""Models for a table as the census's: stacked experts, or a list of layers."""

import keras
import numpy as np
from keras import ops

import keras_moe
from keras_moe.recommendation.tasks import assemble

BATCH = 1024
EXPERT_UNITS, TOWER_UNITS = 16, 8
# Of the census-income data: 33 columns of categories, seven of numbers.
VOCABULARIES = (
    *(9, 52, 47, 17, 3, 7, 24, 15, 5, 10, 2, 3, 6, 8, 6, 6, 51),
    *(38, 8, 10, 9, 10, 3, 4, 7, 5, 43, 43, 43, 5, 3, 3, 2),
)
NUMBERS = 7
KINDS = ("list of Dense", "stacked")


def features(embedding_dim=8):
    made = [
        keras_moe.layers.Categorical(f"category_{i}", num_ids=size)
        for i, size in enumerate(VOCABULARIES)
    ]
    made += [
        keras_moe.layers.Numeric(f"number_{i}", normalize=None)
        for i in range(NUMBERS)
    ]
    return keras_moe.layers.FeatureEmbedding(made, embedding_dim=embedding_dim)


def batch(num_tasks):
    rng = np.random.default_rng(0)
    x = {
        f"category_{i}": rng.integers(size, size=BATCH).astype("int32")
        for i, size in enumerate(VOCABULARIES)
    }
    for i in range(NUMBERS):
        x[f"number_{i}"] = rng.normal(size=BATCH).astype("float32")
    y = {
        name: rng.integers(2, size=(BATCH, 1)).astype("float32")
        for name in names(num_tasks)
    }
    return x, y


def names(num_tasks):
    return [f"task_{i}" for i in range(num_tasks)]


def tasks(num_tasks):
    return [
        keras_moe.models.TaskSpec(name, tower_units=(TOWER_UNITS,))
        for name in names(num_tasks)
    ]


def model(kind, num_tasks=2, num_experts=8, jit="auto"):
    """A compiled MMoE; but for the experts and gates, all kinds are equal."""
    if kind == "stacked":
        made = keras_moe.models.MMoE(
            tasks(num_tasks), features(), num_experts, (EXPERT_UNITS,)
        )
    else:
        made = keras_moe.models.MultiTaskModel(
            **assemble.assemble(
                tasks(num_tasks),
                features(),
                lambda x: list_of_layers(x, num_tasks, num_experts),
            )
        )
    made.compile("adam", metrics=None, jit_compile=jit)
    return made


def trunk(kind, dim, num_tasks=2, num_experts=8):
    """Experts, gates and towers alone: `(B, dim) -> (B, tasks)`."""
    x = keras.Input((dim,))
    if kind == "stacked":
        mixed = keras_moe.layers.MultiGateMoE(
            num_tasks, (EXPERT_UNITS,), num_shared_experts=num_experts
        )(x)
        mixed = [mixed[:, i] for i in range(num_tasks)]
    else:
        mixed = list_of_layers(x, num_tasks, num_experts)
    outputs = []
    for y in mixed:
        y = keras.layers.Dense(TOWER_UNITS, activation="relu")(y)
        outputs.append(keras.layers.Dense(1, activation="sigmoid")(y))
    return keras.Model(x, ops.concatenate(outputs, axis=-1))


def list_of_layers(x, num_tasks, num_experts):
    """What users write: a `Dense` for each expert and for each gate."""
    experts = [
        keras.layers.Dense(EXPERT_UNITS, activation="relu")(x)
        for _ in range(num_experts)
    ]
    experts = ops.stack(experts, axis=1)  # (B, E, O)
    mixed = []
    for _ in range(num_tasks):
        gate = keras.layers.Dense(num_experts, activation="softmax")(x)
        weighted = ops.expand_dims(gate, axis=-1) * experts
        mixed.append(ops.sum(weighted, axis=1))
    return mixed
