"""What serves a model, exported by Keras in the format of the backend."""

import os

import keras


def export(test, model):
    """Returns the exported model as a function of NumPy arrays."""
    if keras.config.backend() == "torch":
        return _by_torch(test, model)
    return _by_tensorflow(test, model)


def _by_tensorflow(test, model):
    try:
        import tensorflow as tf
    except ImportError:
        test.skipTest("a SavedModel needs TensorFlow")
    path = os.path.join(test.get_temp_dir(), "model")
    model.export(path, format="tf_saved_model", verbose=False)
    loaded = tf.saved_model.load(path)
    return lambda x: loaded.serve(x)  # which does not keep its variables alone


def _by_torch(test, model):
    import torch

    path = os.path.join(test.get_temp_dir(), "model.pt2")
    of_input = {0: torch.export.Dim("batch")}
    inputs = model.input
    shapes = keras.tree.map_structure(lambda _: of_input, inputs)
    model.export(
        path, format="torch", verbose=False, dynamic_shapes=[(shapes,)]
    )
    program = torch.export.load(path).module()
    return lambda x: program(keras.tree.map_structure(torch.from_numpy, x))
