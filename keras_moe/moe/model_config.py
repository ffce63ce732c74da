"""Saves and restores a model's dtype policy and frozen parts."""

import keras

_SETTINGS = ("dtype_policy", "frozen_layers", "frozen_weights")


def settings_of(model):
    """The dtype policy of a model, its frozen layers and frozen weights."""
    return {
        "dtype_policy": keras.dtype_policies.serialize(model.dtype_policy),
        # By position, since Keras may name a layer differently next time.
        "frozen_layers": [
            i for i, layer in enumerate(model.layers) if not layer.trainable
        ],
        # Includes weights of nested layers, whose `trainable` is not saved.
        "frozen_weights": [
            i
            for i, weight in enumerate(_weights(model))
            if not weight.trainable
        ],
    }


def _weights(model):
    return [weight for layer in model.layers for weight in layer.weights]


def deserialized(config, custom_objects=None):
    """Splits a model's config into `(arguments, settings)`."""
    settings = {key: config[key] for key in _SETTINGS if key in config}
    arguments = {
        key: keras.saving.deserialize_keras_object(value, custom_objects)
        if isinstance(value, (dict, list))
        else value
        for key, value in config.items()
        if key not in settings
    }
    return arguments, settings


def made_again(model_class, arguments, settings):
    """Builds a model from its arguments and applies the saved settings."""
    now = keras.config.dtype_policy()
    if "dtype_policy" in settings:
        saved = keras.dtype_policies.get(settings["dtype_policy"])
        keras.config.set_dtype_policy(saved)
    try:
        model = model_class(**arguments)
    finally:
        keras.config.set_dtype_policy(now)
    freeze(model, settings)
    return model


def freeze(model, settings):
    """Applies the frozen layers and weights of saved settings."""
    if not settings:
        return
    for i in settings.get("frozen_layers", ()):
        model.layers[i].trainable = False
    weights = _weights(model)
    for i in settings.get("frozen_weights", ()):
        weights[i].trainable = False
