"""Running layers on the rows of their experts where shapes must be static.

Each layer gets a buffer with room for the largest group, padded with zeros. The
padding must not change the state or the losses of a layer.
"""

import keras
from keras import ops

from keras_moe.experts.grouped_rows import bounds
from keras_moe.experts.grouped_rows import spread
from keras_moe.ops.sizes import as_number
from keras_moe.stacked import layer_copies


def to_buffers(rows, group_sizes, size):
    """Yields `(buffer, real)` for each group: `(size, ...)`, `(size,)` bool."""
    num_rows = ops.shape(rows)[0]
    # A row of zeros, for the index `num_rows`.
    rows = ops.concatenate(
        [rows, ops.zeros((1, *ops.shape(rows)[1:]), rows.dtype)]
    )
    starts, ends = bounds(group_sizes)
    slot = ops.arange(size, dtype="int32")
    for e in range(starts.shape[0]):
        real = slot < ends[e] - starts[e]
        row = ops.where(real, starts[e] + slot, as_number(num_rows))
        yield ops.take(rows, row, axis=0), real


def from_buffers(buffers, group_sizes, size, num_rows):
    """The rows of the buffers in their old order, zero for unused rows."""
    starts, ends = bounds(group_sizes)
    num_groups = len(buffers)
    row = ops.arange(num_rows, dtype="int32")
    ended = ops.expand_dims(ends, 0) <= ops.expand_dims(row, 1)  # (N, E)
    group = ops.sum(ops.cast(ended, "int32"), axis=1)
    group = ops.cast(group, "int32")
    starts = ops.concatenate([starts, ops.zeros((1,), "int32")])
    slot = row - ops.take(starts, group)
    found = ops.logical_and(group < num_groups, slot < size)
    nowhere = as_number(num_groups * size)
    place = ops.where(found, group * size + slot, nowhere)
    nothing = ops.zeros((1, *ops.shape(buffers[0])[1:]), buffers[0].dtype)
    return ops.take(ops.concatenate([*buffers, nothing]), place, axis=0)


def run(layer, buffer, real, training, call, static=True):
    """`call(layer, buffer, ...)`, without any effect of the padding.

    Without `static`, there is padding only if no row is real, and then `call`
    restores the state.
    """
    kept = layer_copies.state(layer) if training else []
    kwargs = {}
    if kept and static:
        kwargs["mask"] = _mask(layer, buffer, real)
    regularized = layer_copies.with_activity_regularizer(layer)
    originals = [part.activity_regularizer for part in regularized]
    wrapped = [_OfRealRows(original, real) for original in originals]
    before = len(layer.losses)
    supports_masking = layer.supports_masking
    try:
        if "mask" in kwargs:  # else Keras warns about the mask
            layer.supports_masking = True
        for part, regularizer in zip(regularized, wrapped, strict=True):
            part.activity_regularizer = regularizer
        out = call(layer, buffer, kwargs, kept, ops.any(real))
    finally:
        layer.supports_masking = supports_masking
        for part, original in zip(regularized, originals, strict=True):
            part.activity_regularizer = original
    known = sum(regularizer.calls for regularizer in wrapped)
    added = len(layer.losses) - before
    if static and added > known and "mask" not in kwargs:
        raise ValueError(
            "A layer that adds losses with `add_loss` cannot be an expert "
            "where shapes must be static (on JAX, or under XLA): its losses "
            "would count padding. Give it an `activity_regularizer` instead. "
            f"Received: layer={layer.name!r}"
        )
    return out


def _mask(layer, buffer, real):
    if not layer_copies.hands_on_mask(layer):
        raise ValueError(
            "A layer with state that training changes (BatchNormalization) can "
            "be an expert where shapes must be static (on JAX, or under XLA) "
            "only if it takes a `mask` and hands it on to where the state is: "
            "padding would spoil it otherwise. Use a layer without such state, "
            "like LayerNormalization or GroupNormalization, or freeze it. "
            f"Received: layer={layer.name!r}"
        )
    return ops.broadcast_to(
        spread(real, buffer)[..., 0], ops.shape(buffer)[:-1]
    )


class _OfRealRows(keras.regularizers.Regularizer):
    """A regularizer of the real rows only.

    Keras divides by the size of the buffer, this class by the real rows.
    """

    def __init__(self, regularizer, real):
        self.regularizer = regularizer
        self.real = real
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        keep = spread(self.real, x)
        value = self.regularizer(ops.where(keep, x, ops.zeros_like(x)))
        number = ops.sum(ops.cast(self.real, value.dtype))
        size = ops.cast(ops.shape(x)[0], value.dtype)
        return value * size / ops.maximum(number, ops.ones_like(number))
