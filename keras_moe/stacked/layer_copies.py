"""Copies of a layer, and questions about a layer that runs on rows."""

import inspect

import keras

from keras_moe.stacked.draws import unshared
from keras_moe.stacked.draws import with_seeds


def config_of(layer):
    """The serialized layer, without the config that builds it on loading."""
    config = keras.saving.serialize_keras_object(layer)
    config.pop("build_config", None)
    return config


def template_of(layer):
    """The serialized layer, to keep when the layer itself is gone."""
    return unshared(config_of(layer))


def make_copies(layer, number, scope):
    """New layers from a layer's config, each with its own name and seeds."""
    config = template_of(layer)
    copies = []
    # Finds classes that are not registered.
    with keras.saving.custom_object_scope(_classes(layer)):
        for e in range(number):
            own = with_seeds(config, e)
            own["config"]["name"] = f"expert_{e}"
            # Names the variables that a model makes in its constructor.
            with keras.name_scope(scope), keras.name_scope(f"expert_{e}"):
                copies.append(keras.saving.deserialize_keras_object(own))
    return copies


def _classes(layer):
    found = {keras.saving.get_registered_name(type(layer)): type(layer)}
    for part in getattr(layer, "layers", ()):
        found.update(_classes(part))
    return found


def build(layer, rows_shape, dtype):
    """Builds the layer as a call with rows of this shape would."""
    if layer.built:
        return
    if type(layer).build is keras.layers.Layer.build:
        layer(keras.KerasTensor(rows_shape, dtype))
    else:
        layer.build(rows_shape)


def output_shape(layer, rows_shape, dtype):
    """Output shape of the layer for rows of a shape."""
    output = layer.compute_output_spec(keras.KerasTensor(rows_shape, dtype))
    if not isinstance(output, keras.KerasTensor):
        raise ValueError(
            "`layer` must return one tensor. "
            f"Received: layer={layer.name!r}, which returns {output}"
        )
    if not output.shape or output.shape[0] != rows_shape[0]:
        raise ValueError(
            "`layer` must return a row for each row of its input. Received: "
            f"layer={layer.name!r}, whose output is {tuple(output.shape)} for "
            f"rows of shape {tuple(rows_shape)}"
        )
    return tuple(output.shape)


def takes(layer, argument):
    """Whether `call` has this argument."""
    return argument in inspect.signature(layer.call).parameters


def state(layer):
    """Variables, except seeds, that a call in training may change."""
    if not layer.trainable:
        return []
    return [
        v
        for v in layer.non_trainable_variables
        if "float" in keras.backend.standardize_dtype(v.dtype)
    ]


def hands_on_mask(layer):
    """Whether a mask given to the layer reaches all its state."""
    if not isinstance(layer, keras.Model):
        return takes(layer, "mask")
    if not isinstance(layer, keras.Sequential):
        # A functional model takes a mask, but may not pass it on.
        return not hasattr(layer, "operations") and takes(layer, "mask")
    mask = True
    for part in layer.layers:
        if state(part) and not (mask and hands_on_mask(part)):
            return False
        if mask and not part.supports_masking:
            mask = False
        elif mask and not isinstance(part, keras.Model):
            mask = part.compute_mask(None, True) is not None
    return True


def with_activity_regularizer(layer):
    """The layer and its inner layers that have an activity regularizer."""
    found = [layer] if layer.activity_regularizer is not None else []
    for part in getattr(layer, "layers", ()):
        found += with_activity_regularizer(part)
    return found
