"""What holds for every ready-made model."""

import os

import keras
import numpy as np

from keras_moe import layers
from keras_moe import models

DIM = 6


def vectors(**kwargs):
    """An embedding that is the input `x` as it is."""
    return layers.FeatureEmbedding([layers.Embedded("x", DIM)], **kwargs)


def specs(*names, **kwargs):
    return [models.TaskSpec(name, tower_units=(), **kwargs) for name in names]


def batch(size=8, seed=1):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(size, DIM)).astype("float32")}


def labels(model, size=8):
    """Both classes for each task, also where that before it is 1."""
    values = np.arange(size, dtype="float32")
    return {t.name: values // 2**i % 2 for i, t in enumerate(model.tasks)}


def assert_predicts(model, x, expected):
    found = model.predict_on_batch(x)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)


def check_trains_and_saves(test, model, x):
    """Trains a step, saves, loads: the same numbers and no shared weight."""
    model.compile(keras.optimizers.SGD(0.1))
    size = len(next(iter(x.values())))
    before = [keras.ops.convert_to_numpy(w) for w in model.trainable_weights]
    loss = model.train_on_batch(x, labels(model, size))
    test.assertTrue(np.isfinite(np.ravel(loss)).all())
    after = [keras.ops.convert_to_numpy(w) for w in model.trainable_weights]
    changed = [np.any(a != b) for a, b in zip(before, after, strict=True)]
    test.assertGreater(np.mean(changed), 0.6)
    path = os.path.join(test.get_temp_dir(), "model.keras")
    model.save(path)
    again = keras.models.load_model(path)
    test.assertIs(type(again), type(model))
    expected = model.predict_on_batch(x)
    for name, values in again.predict_on_batch(x).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5)
    copied = type(model).from_config(model.get_config())
    shapes = [w.shape for w in model.trainable_weights]
    test.assertEqual([w.shape for w in copied.trainable_weights], shapes)
    own = {id(w) for w in model.weights}
    test.assertFalse(own & {id(w) for w in copied.weights})
    return again
