"""Models that earlier versions saved are loaded, and predict what they did.

The files are in `tests/data/saved`, see the README beside it. Others may be put
there: nothing here knows their names.
"""

import gc
import os
import pathlib
import re
import zipfile

import keras
import numpy as np
from absl.testing import parameterized

import keras_moe
from tests.test_case import TestCase

FOLDER = pathlib.Path(__file__).parent / "data" / "saved"
NAMES = sorted(path.stem for path in FOLDER.glob("*.keras"))
WEIGHTS = sorted(path.name for path in FOLDER.glob("*.weights.h5"))
STEPS = 2


def shared_ids(path):
    """The ids of shared objects in a saved model's config."""
    with zipfile.ZipFile(path) as file:
        config = file.read("config.json").decode()
    return {int(x) for x in re.findall(r'"shared_object_id": (\d+)', config)}


@keras.saving.register_keras_serializable("tests")
class MoEModel(keras.Model):
    """A model that is no graph, with its layers in a list."""

    def __init__(self, num_layers, units, **kwargs):
        super().__init__(**kwargs)
        self.num_layers = num_layers
        self.units = units
        self.blocks = [
            keras_moe.layers.MoE(3, 4, top_k=1 + i % 2)
            for i in range(num_layers)
        ]
        self.head = keras.layers.Dense(units)

    def call(self, inputs, training=None):
        x = inputs
        for block in self.blocks:
            x = x + block(x, training=training)
        return self.head(x)

    def get_config(self):
        return {
            **super().get_config(),
            "num_layers": self.num_layers,
            "units": self.units,
        }


@keras.saving.register_keras_serializable("tests")
def heads_with_a_shared_layer(features, tasks):
    shared = keras.layers.Dense(3, "relu", name="shared_by_tasks")
    return {
        task.name: keras.layers.Dense(1, "sigmoid", name=task.name)(shared(x))
        for task, x in zip(tasks, features, strict=True)
    }


def load(path):
    model = keras.models.load_model(path)
    # Elsewhere compiling takes longer than all else: minutes on PyTorch, for
    # Keras saves that a model is compiled on JAX.
    on_jax = keras.config.backend() == "jax"
    model.jit_compile = on_jax
    model.run_eagerly = not on_jax
    return model


def next_losses(model, x, y):
    """The losses of further steps of training."""
    losses = []
    for _ in range(STEPS):
        model.reset_metrics()
        logs = model.train_on_batch(x, y, return_dict=True)
        losses.append(float(logs["loss"]))
    return np.array(losses)


def read(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def tree(arrays, name):
    """`arrays[name]`, or the dict of those whose keys are `name/...`."""
    if name in arrays:
        return arrays[name]
    return {
        key.split("/", 1)[1]: value
        for key, value in arrays.items()
        if key.startswith(f"{name}/")
    }


class SavedModelsTest(TestCase):
    def check(self, model, arrays):
        """The model gives what was recorded, for the inputs recorded."""
        tolerance = float(arrays.get("tolerance", 1e-5))
        actual = model.predict_on_batch(tree(arrays, "in"))
        expected = tree(arrays, "out")
        if not isinstance(expected, dict):
            actual, expected = {"": actual}, {"": expected}
        self.assertEqual(sorted(actual), sorted(expected))
        for name, recorded in expected.items():
            # Not by the largest: logits of what cannot be are -1e9.
            scale = max(np.median(np.abs(recorded)), 1.0)
            np.testing.assert_allclose(
                keras.ops.convert_to_numpy(actual[name]),
                recorded,
                rtol=tolerance,
                atol=tolerance * scale,
                err_msg=name,
            )

    def test_files(self):
        self.assertGreater(len(NAMES), 40)
        recorded = sorted(path.stem for path in FOLDER.glob("*.npz"))
        self.assertEqual(NAMES, recorded)

    @parameterized.named_parameters(zip(NAMES, NAMES, strict=True))
    def test_model(self, name):
        arrays = read(name)
        # Saved and loaded once more: what is wrong at first is wrong then too.
        path = os.path.join(self.get_temp_dir(), "again.keras")
        model = load(FOLDER / f"{name}.keras")
        model.save(path)
        if keras.config.backend() == "torch":  # others have many more objects
            # Keras names shared objects by their addresses, which others may
            # have by now if the objects are gone.
            alive = {id(x) for x in gc.get_objects()}
            self.assertContainsSubset(shared_ids(path), alive)
        model = load(path)
        self.check(model, arrays)
        raw = tree(arrays, "raw")
        if raw:
            encoded = model.get_layer("features").encode(raw)
            for column, recorded in tree(arrays, "in").items():
                np.testing.assert_array_equal(encoded[column], recorded)
        # Keras saves optimizers of PyTorch as such: they train nowhere else.
        if arrays.get("backend") == keras.config.backend():
            losses = next_losses(
                model, tree(arrays, "in"), tree(arrays, "label")
            )
            np.testing.assert_allclose(losses, arrays["next_loss"], rtol=1e-4)

    @parameterized.named_parameters(zip(WEIGHTS, WEIGHTS, strict=True))
    def test_weights(self, file):
        name = file.removesuffix(".weights.h5")
        model = load(FOLDER / f"{name}.keras")
        for variable in model.weights:
            variable.assign(np.zeros(variable.shape))
        model.load_weights(FOLDER / file)
        self.check(model, read(name))
