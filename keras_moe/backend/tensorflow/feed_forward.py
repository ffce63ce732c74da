"""The arithmetic of feed-forward experts, and its gradients."""

import tensorflow as tf


def sum_dtype(dtype):
    """The dtype for sums of numbers of a dtype."""
    return tf.float64 if dtype == tf.float64 else tf.float32


class FeedForward:
    """One expert, `(D, F)` and so on, or all of them at once, `(E, D, F)`.

    Rows are of shape `(N, D)`, for all experts at once `(E, N, D)`.
    """

    def __init__(self, kernels, biases, hidden):
        self.kernels = kernels
        self.biases = biases
        self._hidden = hidden

    @property
    def weights(self):
        return (*self.kernels, *(b for b in self.biases if b is not None))

    def with_weights(self, weights):
        kernels = weights[: len(self.kernels)]
        rest = iter(weights[len(self.kernels) :])
        biases = [None if b is None else next(rest) for b in self.biases]
        return FeedForward(kernels, biases, self._hidden)

    def products(self, x):
        """What the hidden layer is made of."""
        layers = zip(self.kernels[:-1], self.biases[:-1], strict=True)
        return [_dense(x, kernel, bias) for kernel, bias in layers]

    def outputs(self, products):
        return _dense(self.hidden(products), self.kernels[-1], self.biases[-1])

    def hidden(self, products):
        width = products[0].shape[-1]
        rows = [tf.reshape(p, (-1, width)) for p in products]
        return tf.reshape(self._hidden(*rows), tf.shape(products[0]))

    def gradients(self, x, d_y, row_weights, products, own=None):
        """Of `sum(d_y * row_weights * y)`, where `y` are the outputs for `x`.

        Args:
            x: `(..., N, D)`.
            d_y: `(..., N, O)`.
            row_weights: `(..., N)`, in `sum_dtype`.
            products: What `products(x)` gave.
            own: `(..., N)` bool, or `None` for all. Rows that count; the other
                rows of all of the above must be zero.

        Returns:
            Gradients of `x` and `row_weights`, both in `sum_dtype`, and a list
            of gradients for `self.weights`.
        """
        dtype, wide = x.dtype, row_weights.dtype

        def clean(rows):
            # Zero times infinity would be NaN.
            if own is None:
                return rows
            return tf.where(own[..., None], rows, tf.zeros_like(rows))

        with tf.GradientTape() as tape:
            tape.watch(products)
            h = self.hidden(products)
        d_h = tf.matmul(d_y, self.kernels[-1], transpose_b=True)
        d_h, wide_h = tf.cast(d_h, wide), tf.cast(h, wide)
        d_row_weights = tf.reduce_sum(clean(wide_h * d_h), -1)
        d_products = tape.gradient(
            h,
            products,
            tf.cast(d_h * row_weights[..., None], dtype),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        d_products = [clean(d) for d in d_products]
        d_x = [
            tf.cast(tf.matmul(d, kernel, transpose_b=True), wide)
            for d, kernel in zip(d_products, self.kernels[:-1], strict=True)
        ]
        h = clean(tf.cast(wide_h * row_weights[..., None], dtype))
        d_weights = [
            *(tf.matmul(x, d, transpose_a=True) for d in d_products),
            tf.matmul(h, d_y, transpose_a=True),
        ]
        for bias, d in zip(self.biases[:-1], d_products, strict=True):
            if bias is not None:
                d_bias = tf.reduce_sum(tf.cast(d, wide), -2)
                d_weights.append(tf.cast(d_bias, dtype))
        if self.biases[-1] is not None:
            d_y = tf.cast(d_y, wide)
            bias = tf.cast(self.biases[-1], wide)[..., None, :]
            d_row_weights += tf.reduce_sum(clean(d_y * bias), -1)
            d_bias = tf.reduce_sum(d_y * row_weights[..., None], -2)
            d_weights.append(tf.cast(d_bias, dtype))
        return clean(tf.add_n(d_x)), d_row_weights, d_weights


def _dense(x, kernel, bias):
    out = tf.matmul(x, kernel)
    return out if bias is None else out + bias[..., None, :]
