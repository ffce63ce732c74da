"""The base class of the tests, and the only place that imports keras.src."""

import functools

import keras
import numpy as np
from keras import ops
from keras.src import testing


class TestCase(testing.TestCase):
    # Whether TensorFlow differentiates in a graph, as `fit` does. Tracing takes
    # most of the time there: what has another test in a graph does without.
    in_graph = True

    def setUp(self):
        super().setUp()
        keras.utils.set_random_seed(0)

    def outputs_and_gradients(
        self,
        layer,
        inputs,
        cotangent=None,
        losses=False,
        whole_paths=False,
        **kwargs,
    ):
        """Runs a built layer, and differentiates `sum(outputs * cotangent)`.

        With `losses`, the losses the layer adds are part of the sum. Returns
        the outputs, the gradient of the inputs, and the gradients of the
        trainable variables by their path without the layer's name, which the
        paths in a functional model (`whole_paths`) do not have.
        """
        differentiate = {
            "jax": _gradients_jax,
            "tensorflow": functools.partial(
                _gradients_tensorflow, in_graph=self.in_graph
            ),
            "torch": _gradients_torch,
        }[keras.config.backend()]
        inputs = ops.convert_to_tensor(inputs)

        def objective(outputs, added):
            outputs = ops.cast(outputs, "float32")
            if cotangent is not None:
                outputs = outputs * ops.convert_to_tensor(cotangent, "float32")
            total = ops.sum(outputs)
            return total + sum(added) if losses and added else total

        outputs, d_inputs, d_variables = differentiate(
            layer, inputs, objective, kwargs
        )
        names = [v.path for v in layer.trainable_variables]
        if not whole_paths:
            names = [name.split("/", 1)[1] for name in names]
        return (
            ops.convert_to_numpy(outputs),
            ops.convert_to_numpy(d_inputs),
            {
                name: ops.convert_to_numpy(gradient)
                for name, gradient in zip(names, d_variables, strict=True)
            },
        )

    def assert_relative(self, actual, expected, tolerance=1e-5):
        """`max |actual - expected|` within tolerance of `max |expected|`."""
        actual = ops.convert_to_numpy(actual)
        scale = max(np.max(np.abs(expected), initial=0.0), 1.0)
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=tolerance * scale
        )


def _gradients_jax(layer, inputs, objective, kwargs):
    import jax

    def loss(trainable, inputs):
        outputs, _, losses = layer.stateless_call(
            trainable,
            [v.value for v in layer.non_trainable_variables],
            inputs,
            return_losses=True,
            **kwargs,
        )
        return objective(outputs, losses), outputs

    (d_variables, d_inputs), outputs = jax.jit(
        jax.grad(loss, argnums=(0, 1), has_aux=True)
    )([v.value for v in layer.trainable_variables], inputs)
    return outputs, d_inputs, d_variables


def _gradients_tensorflow(layer, inputs, objective, kwargs, in_graph):
    import tensorflow as tf

    def run(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, **kwargs)
            loss = objective(outputs, layer.losses)
        variables = [v.value for v in layer.trainable_variables]
        return outputs, *tape.gradient(
            loss,
            [inputs, variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )

    return (tf.function(run) if in_graph else run)(inputs)


def _gradients_torch(layer, inputs, objective, kwargs):
    import torch

    inputs = inputs.clone().requires_grad_()
    variables = [v.value for v in layer.trainable_variables]
    outputs = layer(inputs, **kwargs)
    loss = objective(outputs, layer.losses)
    gradients = torch.autograd.grad(
        loss, [inputs, *variables], materialize_grads=True
    )
    return outputs.detach(), gradients[0], list(gradients[1:])
