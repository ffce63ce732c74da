"""Functions to time: forward, and forward with all gradients, of a layer."""

import keras
import numpy as np
from keras import ops


def forward_step(layer, x, xla=False):
    """A function without arguments that computes the outputs for `x`."""
    return _BACKENDS[keras.config.backend()](layer, x, xla)[0]


def gradient_step(layer, x, xla=False):
    """The same with the gradients of `x` and all weights, in training."""
    return _BACKENDS[keras.config.backend()](layer, x, xla)[1]


def _cotangent(outputs):
    shape = tuple(outputs.shape)
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def _jax(layer, x, xla):
    import jax

    x = ops.convert_to_tensor(x, dtype=layer.compute_dtype)
    cotangent = _cotangent(layer(x))
    trainable = [v.value for v in layer.trainable_variables]
    state = [v.value for v in layer.non_trainable_variables]
    grad = ops.convert_to_tensor(cotangent, dtype=layer.compute_dtype)

    @jax.jit
    def forward(trainable, state, x):
        return layer.stateless_call(trainable, state, x, training=False)[0]

    def loss(trainable, x, state):
        outputs, state, losses = layer.stateless_call(
            trainable, state, x, training=True, return_losses=True
        )
        return ops.sum(outputs * grad) + sum(losses), (outputs, state)

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return (
        lambda: jax.block_until_ready(forward(trainable, state, x)),
        lambda: jax.block_until_ready(both(trainable, x, state)),
    )


def _tensorflow(layer, x, xla):
    import tensorflow as tf

    x = ops.convert_to_tensor(x, dtype=layer.compute_dtype)
    cotangent = _cotangent(layer(x))
    grad = ops.convert_to_tensor(cotangent, dtype=layer.compute_dtype)

    @tf.function(jit_compile=xla)
    def forward(x):
        return layer(x, training=False)

    @tf.function(jit_compile=xla)
    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, training=True)
            loss = tf.reduce_sum(outputs * grad)
            for more in layer.losses:
                loss += tf.cast(more, loss.dtype)
        return outputs, tape.gradient(
            loss, [x, *(v.value for v in layer.trainable_variables)]
        )

    def wait_for(function):
        function(x)
        if tf.config.list_physical_devices("GPU"):
            tf.test.experimental.sync_devices()

    return lambda: wait_for(forward), lambda: wait_for(both)


def _torch(layer, x, xla):
    import torch

    own = isinstance(layer, keras.layers.Layer)
    if own:
        dtype = layer.compute_dtype
        x = ops.convert_to_tensor(x, dtype=dtype).requires_grad_()
        outputs = layer(x)
        weights = [v.value for v in layer.trainable_variables]
        call = layer
    else:
        # A block of HF transformers, which takes (batch, length, dim).
        weights = list(layer.parameters())
        x = torch.as_tensor(x, dtype=weights[0].dtype, device=weights[0].device)
        outputs = x = x[None].requires_grad_()

        def call(x, training):
            outputs = layer(x)
            return outputs[0] if isinstance(outputs, tuple) else outputs

    grad = torch.as_tensor(_cotangent(outputs)).to(x)

    def forward():
        with torch.no_grad():
            call(x, training=False)
        wait()

    def both():
        outputs = call(x, training=True)
        loss = (outputs * grad).sum()
        for more in layer.losses if own else ():
            loss = loss + more
        gradients = torch.autograd.grad(loss, [x, *weights])
        wait()
        return gradients

    def wait():
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    return forward, both


_BACKENDS = {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}
