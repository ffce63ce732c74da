"""Normalizations of what routers see, and of what they make of it."""

from keras import ops


def rms_normalized(x, epsilon, axis=-1):
    """`x` over its root mean square along an axis."""
    square = ops.mean(ops.square(x), axis=axis, keepdims=True)
    return x * ops.rsqrt(square + epsilon)


def l2_normalized(x, epsilon, axis=-1):
    """`x` over its length along an axis; `epsilon` is added to its square."""
    square = ops.sum(ops.square(x), axis=axis, keepdims=True)
    return x * ops.rsqrt(square + epsilon)


def unit_vectors(x, axis=-1):
    """`x` over its length along an axis, which counts as 1e-12 at least."""
    x = ops.convert_to_tensor(x)
    square = ops.sum(ops.square(x), axis=axis, keepdims=True)
    short = square < 1e-24
    # The gradient of so large a quotient would be next to infinite.
    x = ops.where(short, ops.stop_gradient(x), x)
    square = ops.where(short, ops.full_like(square, 1e-24), square)
    return x / ops.sqrt(square)


def standardized(logits):
    """Logits over their standard deviation; equal logits stay as they are."""
    mean = ops.mean(logits, axis=-1, keepdims=True)
    square = ops.sum(ops.square(logits - mean), axis=-1, keepdims=True)
    variance = square / (logits.shape[-1] - 1)
    varied = variance > 1e-20
    deviation = ops.sqrt(ops.where(varied, variance, ops.ones_like(variance)))
    return logits / deviation
