"""Seeds and initializers of their own for the parts of a layer."""

import numpy as np

from keras_moe.checks import is_int


def with_seeds(config, stream):
    """The config with another int for every int under the name `seed`.

    And without the ids by which Keras knows an object again as it loads a
    model: copies would be one and the same.
    """
    if isinstance(config, dict):
        return {
            key: _seed(value, stream)
            if key == "seed" and isinstance(value, int)
            else with_seeds(value, stream)
            for key, value in config.items()
            if key != "shared_object_id"
        }
    if isinstance(config, (list, tuple)):
        return type(config)(with_seeds(value, stream) for value in config)
    return config


def _seed(seed, stream):
    sequence = np.random.SeedSequence([abs(seed), stream])
    return int(sequence.generate_state(1)[0]) >> 1


def own_seed(seed, number):
    """A seed for part `number` of a layer that was given one."""
    return with_seeds({"seed": seed}, number)["seed"]


def own_draws(initializer, number):
    """The initializer with a seed of its own for part `number`."""
    if not is_int(getattr(initializer, "seed", None)):
        return initializer
    # Not by `keras.initializers.serialize`, which imports TensorFlow, if it is
    # installed, on every backend.
    config = with_seeds(initializer.get_config(), number)
    return type(initializer).from_config(config)
