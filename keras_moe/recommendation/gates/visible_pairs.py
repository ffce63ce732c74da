"""Weights of gates for the experts they see, and no others."""

import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.stacked.per_expert import PerExpertInitializer


class VisiblePairs:
    """The `N` pairs of a gate and an expert that it sees, gate by gate.

    Args:
        visible: Matrix of zeros and ones `(gates, experts)`.
        may_be_blind: bool. Whether a gate may see no expert.

    Attributes:
        visible: `(G, E)` boolean array.
        number: int. `N`.
        per_gate: List of `G` ints. How many experts each gate sees.
    """

    def __init__(self, visible, may_be_blind=False):
        given, visible = visible, np.array(visible)
        if (
            visible.ndim != 2
            or not visible.size
            or not np.isin(visible, (0, 1)).all()
            or not (may_be_blind or visible.any(axis=-1).all())
        ):
            raise ValueError(
                "`visible` must be a matrix of zeros and ones (gates, "
                "experts), in which each gate sees an expert. "
                f"Received: visible={given!r}"
            )
        self.visible = visible.astype("bool")
        self.per_gate = self.visible.sum(axis=-1).tolist()
        self.number = sum(self.per_gate)
        # The index of each pair; N where there is no pair.
        self._places = np.full(self.visible.shape, self.number, "int32")
        self._places[self.visible] = np.arange(self.number)
        self._pairs = np.flatnonzero(self.visible)

    def spread(self, values, axis=0):
        """From an axis of `N` pairs to one of `G * E`, 0 for the others."""
        if self.number == self.visible.size:
            return values
        values = ops.convert_to_tensor(values)
        zero = ops.zeros_like(values[:1] if axis == 0 else values[:, :1])
        values = ops.concatenate([values, zero], axis=axis)
        return backend.take(values, self._places.reshape(-1), axis=axis)

    def gather(self, values):
        """`(B, G, E)` -> `(B, N)`."""
        values = ops.reshape(values, (-1, self.visible.size))
        return backend.take(values, self._pairs, axis=1)

    def logits(self, x, kernel, bias=None):
        """Applies the row of each pair, 0 for all others.

        Args:
            x: `(B, D)`, or `(B, G, D)` with a row for each gate.
            kernel: `(N, D)`.
            bias: `(N,)`. Defaults to `None`.

        Returns:
            `(B, G, E)`.
        """
        shape = self.visible.shape
        kernel = self.spread(kernel)  # (G * E, D)
        if len(x.shape) == 2:
            logits = ops.einsum("bd,nd->bn", x, kernel)
            logits = ops.reshape(logits, (-1, *shape))
        else:
            kernel = ops.reshape(kernel, (*shape, x.shape[-1]))
            logits = ops.einsum("bgd,ged->bge", x, kernel)
        if bias is not None:
            logits = logits + ops.reshape(self.spread(bias), shape)
        return logits


class PerGateInitializer(PerExpertInitializer):
    """Draws the kernel of each gate, `(D, experts it sees)`, separately."""

    def __init__(self, initializer, sizes):
        super().__init__(initializer, stream=0)
        self.sizes = sizes

    def __call__(self, shape, dtype=None):
        draws = self._draws(len(self.sizes))
        return ops.concatenate(
            [
                ops.transpose(draw((shape[-1], size), dtype=dtype))
                for draw, size in zip(draws, self.sizes, strict=True)
                if size
            ]
        )
