"""Examples of a few features, and what is done with every model."""

import os

import keras
import numpy as np

from keras_moe import layers
from keras_moe import models

TASKS = ("click", "buy")


def make_features(**kwargs):
    return layers.FeatureEmbedding(
        [
            layers.Categorical("tab", num_ids=2),
            layers.Numeric("age", normalize=None),
            layers.Categorical("user", num_ids=5),
            layers.Embedded("vector", 3),
        ],
        embedding_dim=4,
        # Far from each other, so that a wrong one shows.
        embeddings_initializer=keras.initializers.RandomNormal(stddev=1.0),
        **kwargs,
    )


def make_data(n=24):
    rng = np.random.default_rng(0)
    x = {
        "tab": rng.integers(-2, 2, n).astype("int32"),
        "age": rng.normal(size=n).astype("float32"),
        "user": rng.integers(0, 5, n).astype("int32"),
        "vector": rng.normal(size=(n, 3)).astype("float32"),
    }
    y = {name: rng.integers(0, 2, n).astype("float32") for name in TASKS}
    return x, y


def small_tasks(tower_units=(4,)):
    return [models.TaskSpec(name, tower_units=tower_units) for name in TASKS]


def scramble(model):
    """Gives every weight another value, also those that begin alike."""
    rng = np.random.default_rng(1)
    for v in model.weights:
        if v.dtype == "float32":
            low = 0.5 if "variance" in v.path else -1.0
            v.assign(rng.uniform(low, 1.0, v.shape))


def array(x):
    return keras.ops.convert_to_numpy(x)


def outputs_of(model, x, *names):
    """What layers of a model give for inputs, by their names."""
    outputs = {name: model.get_layer(name).output for name in names}
    inputs = dict(model._graph[0])
    x = {name: x[name] for name in inputs}
    return keras.Model(inputs, outputs).predict(x, verbose=0)


def dense(model, name, x, activation=None):
    """What a dense layer of a model must give."""
    kernel, bias = map(array, model.get_layer(name).weights)
    y = x @ kernel + bias
    return np.maximum(y, 0) if activation == "relu" else y


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def check_fit_and_save(test, model, x, y):
    """Trains one step, saves and loads. Returns the logs and the loaded."""
    model.compile("adam")
    logs = model.fit(x, y, batch_size=24, verbose=0).history
    test.assertTrue(np.isfinite(logs["loss"]).all())
    return {name: values[0] for name, values in logs.items()}, check_save(
        test, model, x
    )


def check_save(test, model, x):
    path = os.path.join(test.get_temp_dir(), "model.keras")
    model.save(path)
    loaded = keras.models.load_model(path)
    test.assertIs(type(loaded), type(model))
    if model.compiled:
        test.assertEqual(
            len(loaded.optimizer.variables), len(model.optimizer.variables)
        )
    expected = model.predict(x, verbose=0)
    for task, p in loaded.predict(x, verbose=0).items():
        np.testing.assert_allclose(p, expected[task], rtol=1e-5, err_msg=task)
    return loaded
