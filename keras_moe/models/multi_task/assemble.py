"""A multi-task model from its embedding, its trunk and its heads."""

import keras

from keras_moe.models.multi_task import heads as heads_lib
from keras_moe.models.multi_task.task_spec import check_tasks


def assemble(tasks, embedding, trunk, heads="towers", inputs=None):
    """The arguments of a `MultiTaskModel`.

    Args:
        tasks: Sequence of `TaskSpec`, or names of binary tasks.
        embedding: What makes a vector of the features, see `embed`.
        trunk: Function or layer from a tensor `(B, D)` to a tensor
            `(B, T, O)`, a list of `T` tensors `(B, O)`, or one `(B, O)`.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`.

    Returns:
        A dict with `inputs`, `outputs`, `tasks` and `entire_space`.

    Example:

    ```python
    model = MultiTaskModel(**assemble(
        ["click", "like"], embedding, keras.layers.Dense(64, "relu")))
    ```
    """
    tasks = check_tasks(tasks)
    make_outputs = heads_lib.get(heads)
    inputs, x = embed(embedding, inputs)
    names = {t.name for t in tasks} & set(
        inputs if isinstance(inputs, dict) else ()
    )
    if names:
        raise ValueError(
            "A task must not have the name of a feature: its label would be "
            f"its own input. Received: {sorted(names)}"
        )
    features = heads_lib.split_tasks(trunk(x), tasks)
    return {
        "inputs": inputs,
        "outputs": make_outputs(features, tasks),
        "tasks": tasks,
        "entire_space": make_outputs is heads_lib.esmm,
    }


def embed(embedding, inputs=None):
    """The inputs of a model, and one tensor `(B, D)` of them all.

    Args:
        embedding: A `keras_moe.layers.FeatureEmbedding`; an adapted
            `keras.utils.FeatureSpace`, whose encoded features are then the
            inputs; or any layer or function that is called with the dict of
            inputs (as `keras_rs.layers.DistributedEmbedding` is) and gives a
            tensor, or a dict or list of tensors to concatenate.
        inputs: Dict of `keras.Input` by name. Defaults to those that the
            embedding's `inputs()` gives.

    Returns:
        `(inputs, tensor)`.
    """
    if isinstance(embedding, keras.utils.FeatureSpace):
        encoded = embedding.get_encoded_features()
        # Inputs of their own: the preprocessing stays in the data pipeline.
        if isinstance(encoded, dict):
            inputs = {k: _input_like(v, k) for k, v in encoded.items()}
        else:
            inputs = _input_like(encoded, "features")
        outputs = inputs
    else:
        if inputs is None:
            if not hasattr(embedding, "inputs"):
                raise ValueError(
                    "`inputs`, a dict of `keras.Input` by name, must be given "
                    "with an embedding that has no `inputs()`. "
                    f"Received: embedding={embedding!r}, inputs=None"
                )
            inputs = embedding.inputs()
        outputs = embedding(inputs)
    if isinstance(outputs, dict):
        outputs = [outputs[key] for key in sorted(outputs)]
    if not isinstance(outputs, (list, tuple)):
        outputs = [outputs]
    flat = [x if len(x.shape) == 2 else _flatten(x) for x in outputs]
    if len(flat) == 1:
        return inputs, flat[0]
    return inputs, keras.layers.Concatenate(name="concatenated_features")(flat)


def _flatten(x):
    if len(x.shape) == 1:
        return keras.layers.Reshape((1,))(x)
    return keras.layers.Flatten()(x)


def _input_like(tensor, name):
    return keras.Input(tensor.shape[1:], dtype=tensor.dtype, name=name)
