"""Assembles a multi-task model from an embedding, a trunk and heads."""

import keras

from keras_moe.recommendation.features.feature_embedding import FeatureEmbedding
from keras_moe.recommendation.tasks import heads as heads_lib
from keras_moe.recommendation.tasks.task_spec import as_tasks
from keras_moe.recommendation.tasks.training_arguments import check_tensors


def assemble(tasks, embedding, trunk, heads="towers", inputs=None):
    """Makes the arguments of a `MultiTaskModel`.

    Args:
        tasks: Sequence of `TaskSpec`, or names of binary tasks.
        embedding: Turns the features into a vector, see `embed`.
        trunk: Function or layer from a tensor `(B, D)` to a tensor
            `(B, T, O)`, a list of `T` tensors `(B, O)`, or one `(B, O)`. It is
            called as `trunk(x)`, or as `trunk(x, inputs)` if its attribute
            `uses_inputs` is true, or as `trunk(x, inputs, vectors)` if its
            `uses_vectors` is true, see `feature_vectors`. After the call it may
            have an attribute `logits`: a dict of tensors by task, which the
            heads get as a third argument and add to their logits.
        heads: `"towers"`, `"esmm"`, `"aitm"` or a function
            `(list of tensors, tasks) -> {task: prediction}`. Defaults to
            `"towers"`.
        inputs: Dict of `keras.Input` by name, if `embedding` has no
            `inputs()`. Defaults to `None`.

    Returns:
        A dict with `inputs`, `outputs`, `tasks` and `entire_space`.

    Raises:
        ValueError: If an argument is of the wrong kind, or a task has the name
            of a feature.

    Example:

    ```python
    model = MultiTaskModel(**assemble(
        ["click", "like"], embedding, keras.layers.Dense(64, "relu")))
    ```
    """
    tasks = as_tasks(tasks)
    make_outputs = heads_lib.get(heads)
    inputs, embedded = _embedded(embedding, inputs)
    names = {t.name for t in tasks} & set(
        inputs if isinstance(inputs, dict) else ()
    )
    if names:
        raise ValueError(
            "A task must not have the name of a feature: its label would be "
            f"its own input. Received: {sorted(names)}"
        )
    x, more = _joined(embedded), ()
    if getattr(trunk, "uses_vectors", False):
        more = (inputs, feature_vectors(embedding, embedded, x))
    elif getattr(trunk, "uses_inputs", False):
        more = (inputs,)
    features = heads_lib.split_tasks(trunk(x, *more), tasks)
    logits = getattr(trunk, "logits", None)
    more = () if logits is None else (logits,)
    return {
        "inputs": inputs,
        "outputs": make_outputs(features, tasks, *more),
        "tasks": tasks,
        "entire_space": make_outputs is heads_lib.esmm,
    }


def embed(embedding, inputs=None):
    """The inputs of a model, and one tensor `(B, D)` made of all of them.

    Args:
        embedding: A `keras_moe.layers.FeatureEmbedding`; an adapted
            `keras.utils.FeatureSpace`, whose encoded features are then the
            inputs; or any layer or function that is called with the dict of
            inputs (as `keras_rs.layers.DistributedEmbedding` is) and returns a
            tensor, or a dict or list of tensors to concatenate.
        inputs: Dict of `keras.Input` by name. Defaults to `None`: the result of
            the embedding's `inputs()`.

    Returns:
        `(inputs, tensor)`.
    """
    inputs, outputs = _embedded(embedding, inputs)
    return inputs, _joined(outputs)


def feature_vectors(embedding, outputs, x):
    """The vector `(B, width)` of each feature, by name.

    Args:
        embedding: As in `embed`, and either a `FeatureEmbedding` or one that
            returns a dict.
        outputs: Output of the embedding.
        x: The same output as one tensor `(B, D)`.
    """
    if isinstance(outputs, dict):
        return {name: _flat(vector) for name, vector in outputs.items()}
    if not isinstance(embedding, FeatureEmbedding):
        raise ValueError(
            "This model needs the vector of each feature: `embedding` must be "
            "a FeatureEmbedding, or return a dict. "
            f"Received: embedding={embedding!r}"
        )
    vectors, start = {}, 0
    for feature in embedding.features:
        vectors[feature.name] = x[:, start : start + feature.width]
        start += feature.width
    return vectors


def _embedded(embedding, inputs):
    """The inputs, and the output of the embedding."""
    if inputs is not None:
        check_tensors("inputs", inputs)
    if isinstance(embedding, keras.utils.FeatureSpace):
        encoded = embedding.get_encoded_features()
        # New inputs, so that the preprocessing stays in the data pipeline.
        if isinstance(encoded, dict):
            inputs = {k: _input_like(v, k) for k, v in encoded.items()}
        else:
            inputs = _input_like(encoded, "features")
        return inputs, inputs
    if not callable(embedding) or isinstance(embedding, type):
        raise ValueError(
            "`embedding` must be a layer such as "
            "keras_moe.layers.FeatureEmbedding, or a function. "
            f"Received: embedding={embedding!r}"
        )
    if inputs is None:
        # The `inputs` of a `keras.Model` are a list.
        if not callable(getattr(embedding, "inputs", None)):
            raise ValueError(
                "`inputs`, a dict of `keras.Input` by name, must be given "
                "with an embedding that has no `inputs()`. "
                f"Received: embedding={embedding!r}, inputs=None"
            )
        inputs = embedding.inputs()
    return inputs, embedding(inputs)


def _joined(outputs):
    """One tensor `(B, D)` of a tensor, or of a dict or list of them."""
    if isinstance(outputs, dict):
        outputs = [outputs[key] for key in sorted(outputs)]
    if not isinstance(outputs, (list, tuple)):
        outputs = [outputs]
    flat = [_flat(x) for x in outputs]
    if len(flat) == 1:
        return flat[0]
    return keras.layers.Concatenate(name="concatenated_features")(flat)


def _flat(x):
    return x if len(x.shape) == 2 else _flatten(x)


def _flatten(x):
    if len(x.shape) == 1:
        return keras.layers.Reshape((1,))(x)
    return keras.layers.Flatten()(x)


def _input_like(tensor, name):
    return keras.Input(tensor.shape[1:], dtype=tensor.dtype, name=name)
