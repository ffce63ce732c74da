"""Initializers, regularizers and constraints for banks of expert weights.

A bank holds the weights of all experts in one variable, `(E, ...)`. Keras would
treat its first axis as part of the kernel: fans would be too large by a factor
of `E`, norms would run over several experts, and two draws of one seeded
initializer would be equal.
"""

import keras
import numpy as np
from keras import ops


class PerExpertInitializer(keras.initializers.Initializer):
    """Draws each expert's weights separately, with a different seed."""

    def __init__(self, initializer, stream):
        self.initializer = initializer
        # Makes different draws for two banks with the same seeded initializer.
        self.stream = stream

    def __call__(self, shape, dtype=None):
        return ops.stack(
            [draw(shape[1:], dtype=dtype) for draw in self._draws(shape[0])]
        )

    def _draws(self, num_experts):
        seed = getattr(self.initializer, "seed", None)
        if not isinstance(seed, int):
            # No seed, or a generator whose draws differ by themselves.
            return [self.initializer] * num_experts
        config = self.initializer.get_config()
        if "seed" not in config:
            raise ValueError(
                "An initializer with a `seed` must take it in its config, so "
                f"that each expert can have its own. Received: {config}"
            )
        seeds = np.random.SeedSequence([seed, self.stream])
        return [
            self.initializer.from_config({**config, "seed": int(s) >> 1})
            for s in seeds.generate_state(num_experts)
        ]


class PerExpertRegularizer(keras.regularizers.Regularizer):
    """Sums a regularizer over the experts, and adds one of the whole bank."""

    def __init__(self, regularizer, of_bank=None):
        self.regularizer = regularizer
        self.of_bank = of_bank

    def __call__(self, bank):
        values = [] if self.of_bank is None else [self.of_bank(bank)]
        if self.regularizer is not None:
            values += [self.regularizer(bank[e]) for e in range(bank.shape[0])]
        return sum(values)


class PerExpertConstraint(keras.constraints.Constraint):
    """Constrains each expert's weights separately."""

    def __init__(self, constraint):
        self.constraint = constraint

    def __call__(self, bank):
        return ops.stack(
            [self.constraint(bank[e]) for e in range(bank.shape[0])]
        )
