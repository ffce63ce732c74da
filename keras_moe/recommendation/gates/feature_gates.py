"""Gates on the inputs of experts (HoME)."""

import keras
from keras import ops

from keras_moe.recommendation.gates.unit_inputs import one_by_one
from keras_moe.stacked.draws import own_draws
from keras_moe.stacked.per_expert import PerExpertInitializer


class FeatureGates(keras.layers.Layer):
    """Gates what each expert reads: `(B, D)` or `(B, S, D)` -> `(B, E, D)`.

    ```
    y[:, e] = x * 2 sigmoid(x @ down[e] @ up[e])           x of the slot of e
    ```
    """

    def __init__(self, slots, rank, kernel_initializer, **kwargs):
        super().__init__(**kwargs)
        self.slots = list(slots)
        self.rank = rank
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        dim = input_shape[-1]
        shapes = {"down": (dim, self.rank), "up": (self.rank, dim)}
        for number, (name, shape) in enumerate(shapes.items()):
            kernel = self.add_weight(
                name=f"{name}_kernel",
                shape=(len(self.slots), *shape),
                initializer=PerExpertInitializer(
                    own_draws(self.kernel_initializer, number), 1
                ),
            )
            setattr(self, f"{name}_kernel", kernel)

    def call(self, inputs):
        x = one_by_one(ops.cast(inputs, self.compute_dtype), self.slots)
        hidden = ops.einsum("bed,edr->ber", x, self.down_kernel)
        gate = ops.einsum("ber,erd->bed", hidden, self.up_kernel)
        return x * (2 * ops.sigmoid(gate))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], len(self.slots), input_shape[-1])
