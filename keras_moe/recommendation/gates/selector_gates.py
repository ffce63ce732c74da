"""Gates that learn which experts they use (DSelect-k)."""

import keras
import numpy as np
from keras import ops

from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.checks import check_positive
from keras_moe.checks import check_seed
from keras_moe.ops.scores import softmax
from keras_moe.ops.smooth_step import smooth_step
from keras_moe.stacked.draws import own_draws

SELECTOR_ARGUMENTS = (
    *("top_k", "gamma", "entropy_weight", "unused_code_weight", "seed"),
)


class SelectorGates(keras.layers.Layer):
    """One `DSelectKRouter` per gate: `(B, D)` or `(B, G, D)` -> `(B, G, E)`.

    Each gate numbers the experts it sees in binary. If their number is not a
    power of two, some codes belong to no expert. Weight on them is lost, and a
    loss keeps it small; see `keras_moe.routers.DSelectKRouter`.
    """

    def __init__(
        self,
        visible,
        top_k=2,
        gamma=1.0,
        entropy_weight=0.0,
        unused_code_weight=1.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.visible = np.array(visible, "bool")
        self.num_gates, self.num_experts = self.visible.shape
        self.top_k = top_k
        self.gamma = gamma
        self.entropy_weight = entropy_weight
        self.unused_code_weight = unused_code_weight
        self.seed = seed
        numbers = self.visible.sum(axis=-1)
        self.num_bits = int(numbers.max() - 1).bit_length()
        # The code of each expert, most significant bit first: 1 for a set bit,
        # -1 for a clear one, 0 for a bit that the gate does not need.
        self._codes = np.zeros((*self.visible.shape, self.num_bits), "int32")
        self._has_unused_codes = False
        for gate, number in enumerate(numbers):
            needed = int(number - 1).bit_length()
            self._has_unused_codes |= bool(number < 2**needed)
            rank = np.cumsum(self.visible[gate]) - 1
            for place in range(needed):
                bit = rank >> place & 1
                self._codes[gate, :, self.num_bits - 1 - place] = 2 * bit - 1

    def build(self, input_shape):
        small = keras.initializers.RandomUniform(
            -self.gamma / 100, self.gamma / 100, seed=self.seed
        )
        units = {}
        if self.num_bits:  # 0 if each gate sees one expert
            units["selector"] = self.top_k * self.num_bits
        if self.top_k > 1:
            units["mixture"] = self.top_k
        for number, (name, width) in enumerate(units.items()):
            initializer = small
            if name == "mixture":
                initializer = keras.initializers.RandomUniform(seed=self.seed)
            kernel = self.add_weight(
                name=f"{name}_kernel",
                shape=(self.num_gates, input_shape[-1], width),
                initializer=own_draws(initializer, 2 * number),
            )
            bias = self.add_weight(
                name=f"{name}_bias",
                shape=(self.num_gates, width),
                initializer=own_draws(initializer, 2 * number + 1),
            )
            setattr(self, f"{name}_kernel", kernel)
            setattr(self, f"{name}_bias", bias)

    def _affine(self, name, x):
        kernel = getattr(self, f"{name}_kernel")
        inputs = "bd" if len(x.shape) == 2 else "bgd"
        x = ops.einsum(f"{inputs},gdu->bgu", x, kernel)
        return x + getattr(self, f"{name}_bias")

    def call(self, inputs, training=None):
        selectors = self._selectors(inputs)  # (B, G, K, E)
        if self.top_k > 1:
            mixture = softmax(self._affine("mixture", inputs))
            weights = ops.einsum("bgk,bgke->bge", mixture, selectors)
        else:
            weights = selectors[:, :, 0]
        if training:
            self._regularize(selectors)
        return weights

    def _selectors(self, x):
        visible = ops.convert_to_tensor(self.visible, self.compute_dtype)
        selectors = ops.expand_dims(visible, 1)  # (G, 1, E)
        if not self.num_bits:
            ones = ops.ones((ops.shape(x)[0], 1, self.top_k, 1), x.dtype)
            return selectors * ones
        bits = ops.reshape(
            self._affine("selector", x),
            (-1, self.num_gates, self.top_k, self.num_bits),
        )
        # A loop, since the gradient of `prod` is unreliable at zeros.
        for place in range(self.num_bits):
            code = self._codes[:, None, :, place]
            sign = ops.convert_to_tensor(code, self.compute_dtype)
            # smooth_step(-x) is 1 - smooth_step(x), but never below 0.
            bit = smooth_step(bits[..., place : place + 1] * sign, self.gamma)
            selectors = selectors * ops.where(
                code == 0, ops.ones_like(bit), bit
            )
        return selectors

    def _regularize(self, selectors):
        if self.entropy_weight > 0:
            entropy = -selectors * ops.log(selectors + 1e-6)
            entropy = ops.mean(ops.sum(entropy, axis=(1, 2, 3)))
            self.add_loss(self.entropy_weight * entropy)
        if self._has_unused_codes and self.unused_code_weight > 0:
            used = ops.maximum(ops.sum(selectors, axis=-1), 1e-6)
            unused = ops.mean(ops.sum(1 / used, axis=(1, 2)))
            self.add_loss(self.unused_code_weight * unused)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.num_gates, self.num_experts)


def check_selectors(top_k, gamma, entropy_weight, unused_code_weight, seed):
    check_int("top_k", top_k, 1)
    check_positive("gamma", gamma)
    check_at_least("entropy_weight", entropy_weight, 0)
    check_at_least("unused_code_weight", unused_code_weight, 0)
    check_seed("seed", seed)


def check_replaced(normalization, temperature):
    """Raises if an argument of the linear layer is set, which is not there."""
    for name, value, default in (
        ("normalization", normalization, None),
        ("temperature", temperature, 1.0),
    ):
        if value != default:
            raise ValueError(
                f"`{name}` means nothing with activation='dselect_k'. "
                f"Received: {name}={value!r}"
            )
