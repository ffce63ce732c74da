"""What is saved of a model besides the arguments that it was made with."""

import keras

_SETTINGS = ("dtype_policy", "frozen_layers", "frozen_weights")


def settings_of(model):
    """The dtype policy of a model's parts, and what of it is not trained."""
    return {
        "dtype_policy": keras.dtype_policies.serialize(model.dtype_policy),
        # By their places: names that Keras makes differ from time to time.
        "frozen_layers": [
            i for i, layer in enumerate(model.layers) if not layer.trainable
        ],
        # Those of layers in layers too, whose own `trainable` is not kept.
        "frozen_weights": [
            i
            for i, weight in enumerate(_weights(model))
            if not weight.trainable
        ],
    }


def _weights(model):
    return [weight for layer in model.layers for weight in layer.weights]


def deserialized(config, custom_objects=None):
    """`(arguments, settings)` of what `get_config` of a model gave."""
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
    """A model of these arguments, with the settings of the one saved."""
    now = keras.config.dtype_policy()
    if "dtype_policy" in settings:
        saved = keras.dtype_policies.get(settings["dtype_policy"])
        keras.config.set_dtype_policy(saved)
    try:
        model = model_class(**arguments)
    finally:
        keras.config.set_dtype_policy(now)
    for i in settings.get("frozen_layers", ()):
        model.layers[i].trainable = False
    weights = _weights(model)
    for i in settings.get("frozen_weights", ()):
        weights[i].trainable = False
    return model
