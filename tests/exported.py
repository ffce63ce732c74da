"""What serves a model, exported by Keras in the format of the backend."""

import importlib
import os
import warnings

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


def export_onnx(test, model):
    """Returns the model in ONNX's runtime as a function of NumPy arrays.

    Of a model that has been called: Keras exports no other.
    """
    if keras.config.backend() == "jax":
        test.skipTest("needs jax2onnx, and with it flax, equinox and others")
    try:
        import onnxruntime

        importlib.import_module(
            "tf2onnx" if keras.config.backend() == "tensorflow" else "onnx"
        )
    except ImportError as error:
        test.skipTest(str(error))
    path = os.path.join(test.get_temp_dir(), "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tf2onnx and the tracer give many
        model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)

    def run(x):
        inputs = x if isinstance(x, dict) else {model.input.name: x}
        return keras.tree.pack_sequence_as(
            model.output, session.run(None, inputs)
        )

    return run
