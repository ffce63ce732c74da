"""The gradient of a function of one array, compiled where that is usual."""

import keras
import numpy as np
from keras import ops


def value_and_gradient(function, array):
    """`(float, array)`: `function(array)`, a scalar, and its gradient."""
    (result,) = values_and_gradients(function, array)
    return result


def values_and_gradients(function, *arrays):
    """The same for several arrays of one shape, compiled once."""
    return list(map(differentiated(function), arrays))


def differentiated(function):
    """`array -> (function(array), gradient)`."""
    run = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[
        keras.config.backend()
    ](function)

    def value_and_gradient(array):
        value, gradient = run(np.asarray(array, "float32"))
        return float(value), ops.convert_to_numpy(gradient)

    return value_and_gradient


def _jax(function):
    import jax

    return jax.jit(jax.value_and_grad(function))


def _tensorflow(function):
    import tensorflow as tf

    @tf.function
    def run(array):
        with tf.GradientTape() as tape:
            tape.watch(array)
            value = function(array)
        return value, tape.gradient(
            value, array, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )

    return lambda array: run(tf.constant(array))


def _torch(function):
    import torch

    def run(array):
        array = torch.tensor(array, requires_grad=True)
        value = function(array)
        if not value.requires_grad:
            return value, torch.zeros_like(array)
        (gradient,) = torch.autograd.grad(value, array, materialize_grads=True)
        return value.detach(), gradient

    return run
