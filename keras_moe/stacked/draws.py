"""Seeds and initializers that differ between the parts of a layer."""

import numpy as np

from keras_moe.checks import is_int


def unshared(config):
    """The config without the ids by which Keras recognizes shared objects.

    With them Keras would load all copies as one object. And an id is valid only
    as long as its object is there: another one may get it later.
    """
    if isinstance(config, dict):
        return {
            key: unshared(value)
            for key, value in config.items()
            if key != "shared_object_id"
        }
    if isinstance(config, (list, tuple)):
        return type(config)(unshared(value) for value in config)
    return config


def with_seeds(config, stream):
    """The unshared config with every int `seed` replaced by another int."""
    return _with_seeds(unshared(config), stream)


def _with_seeds(config, stream):
    if isinstance(config, dict):
        return {
            key: _seed(value, stream)
            if key == "seed" and isinstance(value, int)
            else _with_seeds(value, stream)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_with_seeds(value, stream) for value in config)
    return config


def _seed(seed, stream):
    sequence = np.random.SeedSequence([abs(seed), stream])
    return int(sequence.generate_state(1)[0]) >> 1


def own_seed(seed, number):
    """The seed of part `number`, from the seed of the layer."""
    return with_seeds({"seed": seed}, number)["seed"]


def own_draws(initializer, number):
    """The initializer with another seed for part `number`."""
    if not is_int(getattr(initializer, "seed", None)):
        return initializer
    # Not `keras.initializers.serialize`, which imports TensorFlow on every
    # backend if it is installed.
    config = with_seeds(initializer.get_config(), number)
    return type(initializer).from_config(config)
