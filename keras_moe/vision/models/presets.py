"""Models in folders, and published configurations by name."""

import json
import os

import keras

# The names that keras-hub gives them.
_CONFIG = "config.json"
_WEIGHTS = "model.weights.h5"
_TASK = "task.json"
_TASK_WEIGHTS = "task.weights.h5"


class Presets:
    """Mixin of models that are saved to a folder and made from one.

    A subclass has `presets`, a dict of names to dicts with `"description"` and
    `"config"`, the arguments of its constructor.
    """

    presets = {}

    @classmethod
    def from_preset(cls, preset, load_weights=True, **kwargs):
        """A model from a name of `presets`, or from a folder.

        Args:
            preset: str or path. A name of `presets`, which stands for a
                published configuration, with random weights; or a folder that
                `save_to_preset` wrote.
            load_weights: bool. Whether to read the weights of the folder.
                Defaults to `True`.
            **kwargs: Arguments of the constructor that replace those of the
                preset.

        Raises:
            ValueError: If there is no such preset, or it is of another class.
        """
        if str(preset) in cls.presets:
            config = dict(cls.presets[str(preset)]["config"])
            return cls(**{**config, **kwargs})
        config = read_config(preset, cls)
        config["config"].update(kwargs)
        model = keras.saving.deserialize_keras_object(config)
        _check_class(model, cls, preset)
        if load_weights:
            model.load_weights(os.path.join(preset, _WEIGHTS))
        return model

    @classmethod
    def saved_class(cls, preset):
        """The class of the model in a folder."""
        config = read_config(preset, cls)
        return keras.saving.get_registered_object(config["registered_name"])

    def save_to_preset(self, folder):
        """Writes the configuration and the weights to a folder.

        Args:
            folder: str or path. It is made if it is not there.
        """
        os.makedirs(folder, exist_ok=True)
        _write_config(self, os.path.join(folder, _CONFIG))
        self.save_weights(os.path.join(folder, _WEIGHTS))


def _write_config(model, path):
    config = keras.saving.serialize_keras_object(model)
    for key in ("build_config", "compile_config"):
        config.pop(key, None)
    with open(path, "w") as file:
        json.dump(config, file, indent=2)


def save_task(model, folder):
    """Writes a model with a `backbone`, whose preset the folder is too."""
    model.backbone.save_to_preset(folder)
    _write_config(model, os.path.join(folder, _TASK))
    keras.saving.save_weights(
        model,
        os.path.join(folder, _TASK_WEIGHTS),
        objects_to_skip=[model.backbone],
    )


def saved_task(folder, cls, load_weights, arguments):
    """The model that `save_task` wrote, or `None` if there is none.

    Args:
        folder: str or path.
        cls: The class that the model must be of.
        load_weights: bool.
        arguments: dict of arguments of the constructor instead of the saved
            ones. With a `num_classes`, the weights of the backbone alone are
            loaded.
    """
    path = os.path.join(folder, _TASK)
    if not os.path.isfile(path):
        return None
    with open(path) as file:
        config = json.load(file)
    config["config"].update(arguments)
    model = keras.saving.deserialize_keras_object(config)
    _check_class(model, cls, folder)
    if load_weights:
        model.backbone.load_weights(os.path.join(folder, _WEIGHTS))
    if load_weights and "num_classes" not in arguments:
        keras.saving.load_weights(
            model,
            os.path.join(folder, _TASK_WEIGHTS),
            objects_to_skip=[model.backbone],
        )
    return model


def _check_class(model, cls, preset):
    if not isinstance(model, cls):
        raise ValueError(
            f"The preset is a {type(model).__name__}, not a "
            f"{cls.__name__}. Received: preset={str(preset)!r}"
        )


def read_config(preset, cls):
    """The serialized model of a folder."""
    path = os.path.join(preset, _CONFIG)
    if not os.path.isfile(path):
        raise ValueError(
            f"A preset of {cls.__name__} must be one of "
            f"{tuple(cls.presets)}, or a folder with {_CONFIG}. "
            f"Received: preset={str(preset)!r}"
        )
    with open(path) as file:
        return json.load(file)
