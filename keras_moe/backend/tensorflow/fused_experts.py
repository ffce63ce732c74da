"""What the implementations of the fused experts share."""

import tensorflow as tf

from keras_moe.backend.tensorflow.feed_forward import FeedForward
from keras_moe.backend.tensorflow.feed_forward import sum_dtype


def with_own_gradient(forward, tokens, row_weights, kernels, biases, hidden):
    """Calls `forward`, which brings its gradient along.

    Args:
        forward: Takes `tokens`, `row_weights` in `sum_dtype` and `experts`, a
            `FeedForward`. Returns the output in `sum_dtype`, and a function
            from its gradient, in the dtype of `tokens`, to the gradients of
            `tokens` and `row_weights` and a list for `experts.weights`.
        tokens: `(T, D)`.
        row_weights: `(N,)`.
        kernels: As `biases` and `hidden`: what a `FeedForward` is made of.

    Returns:
        The output, in the dtype of `tokens`.
    """
    # A variable read inside of a custom gradient would be asked for there.
    tokens, row_weights = map(tf.convert_to_tensor, (tokens, row_weights))
    kernels = [tf.convert_to_tensor(k) for k in kernels]
    biases = [None if b is None else tf.convert_to_tensor(b) for b in biases]
    experts = FeedForward(kernels, biases, hidden)
    dtype = tokens.dtype

    @tf.custom_gradient
    def call(*inputs):
        # A tape would record, and keep, whatever is made from watched tensors.
        tokens, row_weights, *weights = map(tf.stop_gradient, inputs)
        out, backward = forward(
            tokens,
            tf.cast(row_weights, sum_dtype(dtype)),
            experts.with_weights(weights),
        )

        def gradients(d_out):
            @tf.custom_gradient
            def once(d_out, *inputs):
                d_tokens, d_row_weights, d_weights = backward(d_out)
                d_tokens = tf.cast(d_tokens, dtype)
                d_row_weights = tf.cast(d_row_weights, inputs[1].dtype)
                return (d_tokens, d_row_weights, *d_weights), _refuse

            return once(tf.convert_to_tensor(d_out), *inputs)

        return tf.cast(out, dtype), gradients

    return call(tokens, row_weights, *experts.weights)


def _refuse(*_):
    raise NotImplementedError("Fused experts cannot be differentiated twice.")
