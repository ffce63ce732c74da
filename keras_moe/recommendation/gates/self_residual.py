"""What a unit of AdaTT adds of its own experts, whatever its gate says."""

import keras
import numpy as np
from keras import ops

from keras_moe import backend


class ResidualWeights(keras.layers.Layer):
    """Adds learned weights of each unit's own experts to those of its gate.

    `(B, G, E)` -> `(B, G, E)`. Those of a unit with `n` experts start between
    `-n ** -0.5` and `n ** -0.5`. If no unit has more than one, the weight of
    each is 1, and not learned.
    """

    def __init__(self, own, is_learned, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.own = np.array(own, "bool")
        self.is_learned = is_learned
        self.seed = seed

    def build(self, gates_shape):
        if not self.is_learned:
            return
        numbers = self.own.sum(axis=-1)
        bounds = np.repeat(np.maximum(numbers, 1) ** -0.5, numbers)
        self.weight = self.add_weight(
            name="weight",
            shape=(len(bounds),),
            initializer=lambda shape, dtype: (
                ops.cast(bounds, dtype)
                * keras.random.uniform(
                    shape, -1, 1, dtype=dtype, seed=self.seed
                )
            ),
        )

    def call(self, gates):
        if not self.is_learned:
            return gates + ops.convert_to_tensor(self.own, gates.dtype)
        places = np.zeros(self.own.shape, "int32")
        places[self.own] = np.arange(self.own.sum())
        weights = ops.cast(self.weight, gates.dtype)
        weights = backend.take(weights, places.reshape(-1))
        weights = ops.reshape(weights, self.own.shape)
        return gates + ops.where(self.own, weights, ops.zeros_like(weights))
