"""Copies of a layer, and what has to be known of one to run it on rows."""

import inspect

import keras

from keras_moe.stacked.draws import with_seeds


def config_of(layer):
    """The serialized layer, without what would build it as it is loaded."""
    config = keras.saving.serialize_keras_object(layer)
    config.pop("build_config", None)
    return config


def make_copies(layer, number, scope):
    """New layers from a layer's config, with names and seeds of their own."""
    config = config_of(layer)
    copies = []
    # Its classes are at hand, whether they are registered or not.
    with keras.saving.custom_object_scope(_classes(layer)):
        for e in range(number):
            own = with_seeds(config, e)
            own["config"]["name"] = f"expert_{e}"
            # For the paths of what a model makes at once.
            with keras.name_scope(scope), keras.name_scope(f"expert_{e}"):
                copies.append(keras.saving.deserialize_keras_object(own))
    return copies


def _classes(layer):
    found = {keras.saving.get_registered_name(type(layer)): type(layer)}
    for part in getattr(layer, "layers", ()):
        found.update(_classes(part))
    return found


def build(layer, rows_shape, dtype):
    """Builds the layer as a call with such rows would."""
    if layer.built:
        return
    if type(layer).build is keras.layers.Layer.build:
        layer(keras.KerasTensor(rows_shape, dtype))
    else:
        layer.build(rows_shape)


def output_shape(layer, rows_shape, dtype):
    """Shape of what the layer makes of rows."""
    output = layer.compute_output_spec(keras.KerasTensor(rows_shape, dtype))
    if not isinstance(output, keras.KerasTensor):
        raise ValueError(
            "`layer` must return one tensor. "
            f"Received: layer={layer.name!r}, which returns {output}"
        )
    if not output.shape or output.shape[0] != rows_shape[0]:
        raise ValueError(
            "`layer` must return a row for each of its rows. Received: "
            f"layer={layer.name!r}, which makes {tuple(output.shape)} of rows "
            f"of shape {tuple(rows_shape)}"
        )
    return tuple(output.shape)


def takes(layer, argument):
    return argument in inspect.signature(layer.call).parameters


def state(layer):
    """Variables that a call in training may change, seeds excepted."""
    if not layer.trainable:
        return []
    return [
        v
        for v in layer.non_trainable_variables
        if "float" in keras.backend.standardize_dtype(v.dtype)
    ]


def hands_on_mask(layer):
    """Whether a mask given to the layer reaches wherever it keeps state."""
    if not isinstance(layer, keras.Model):
        return takes(layer, "mask")
    if not isinstance(layer, keras.Sequential):
        # One made of tensors takes a mask whatever becomes of it.
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
    """The layer and the layers of a model in it that have one."""
    found = [layer] if layer.activity_regularizer is not None else []
    for part in getattr(layer, "layers", ()):
        found += with_activity_regularizer(part)
    return found
