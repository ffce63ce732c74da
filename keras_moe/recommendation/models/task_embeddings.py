"""Copies of an embedding, one for each task."""

import math

import keras
from keras import ops

from keras_moe.recommendation.features.feature import layer_name
from keras_moe.stacked.draws import with_seeds


class TaskEmbeddings:
    """A copy of an embedding for each task, and the shared embedding.

    Turns the inputs into a list of tensors `(B, D)`, one for each task and the
    shared one last.

    Args:
        embedding: A layer, see `keras_moe.models.STEM`.
        tasks: Tuple of `TaskSpec`.
    """

    def __init__(self, embedding, tasks):
        if not isinstance(embedding, keras.layers.Layer) or isinstance(
            embedding, keras.utils.FeatureSpace
        ):
            raise ValueError(
                "STEM learns an embedding for each task: `embedding` must be a "
                "layer that it can copy, such as keras_moe.layers."
                f"FeatureEmbedding. Received: embedding={embedding!r}"
            )
        self.layers = [
            *(copy(embedding, t.name, i + 1) for i, t in enumerate(tasks)),
            embedding,
        ]
        if hasattr(embedding, "inputs"):
            self.inputs = embedding.inputs

    def __call__(self, inputs):
        return [_vector(layer(inputs)) for layer in self.layers]


def copy(layer, name, number):
    """A new layer from the layer's config, with other seeds."""
    config = with_seeds(layer.get_config(), number)
    return type(layer).from_config(
        {**config, "name": layer_name(f"{layer.name}_{name}")}
    )


def _vector(outputs):
    """One tensor `(B, D)` from a tensor, or a dict or list of tensors."""
    if isinstance(outputs, dict):
        outputs = [outputs[key] for key in sorted(outputs)]
    if not isinstance(outputs, (list, tuple)):
        outputs = [outputs]
    flat = [ops.reshape(x, (-1, math.prod(x.shape[1:]))) for x in outputs]
    return ops.concatenate(flat, axis=-1) if len(flat) > 1 else flat[0]
