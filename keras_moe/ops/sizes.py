"""Arithmetic with sizes of axes: ints, tensors, or symbolic sizes.

Sizes are symbolic on JAX while Keras infers shapes or a model is exported, and
on PyTorch while a model is exported. Comparing a symbolic size in Python is an
error, or makes it a constant.
"""

from keras import ops

from keras_moe import backend


def is_symbolic_size(size):
    return not isinstance(size, int) and not ops.is_tensor(size)


def as_number(size):
    """The size, as an int32 scalar if it is symbolic."""
    return backend.size_tensor(size) if is_symbolic_size(size) else size


def larger(size, other):
    """The larger of a size and an int."""
    if isinstance(size, int):
        return max(size, other)
    return ops.maximum(as_number(size), other)


def smaller(size, other):
    """The smaller of two sizes."""
    if isinstance(size, int) and isinstance(other, int):
        return min(size, other)
    return ops.minimum(as_number(size), as_number(other))
