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
    """Draws each expert's weights separately, with a different seed.

    With a `shard`, an `ExpertShard`, the shape is that of the own experts. They
    get the numbers that they have in the whole bank.
    """

    def __init__(self, initializer, stream, shard=None):
        self.initializer = initializer
        # Makes different draws for two banks with the same seeded initializer.
        self.stream = stream
        self.shard = shard

    def __call__(self, shape, dtype=None):
        num_experts, own = shape[0], range(shape[0])
        if self.shard is not None:
            num_experts *= self.shard.count
            own = range(*self.shard.bounds(num_experts))
        values = []
        for expert, draw in enumerate(self._draws(num_experts)):
            # An initializer that counts its draws must draw the others too.
            if expert in own or not self._has_seed():
                value = draw(shape[1:], dtype=dtype)
            if expert in own:
                values.append(value)
        return ops.stack(values)

    def _has_seed(self):
        return isinstance(getattr(self.initializer, "seed", None), int)

    def _draws(self, num_experts):
        seed = getattr(self.initializer, "seed", None)
        if not self._has_seed():
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
    """Sums a regularizer over the experts, and adds one of the whole bank.

    With a `shard`, an `ExpertShard`, it is called with the own experts. Their
    penalty counts as often as there are shards, since the loss is the mean over
    the processes.
    """

    def __init__(self, regularizer, of_bank=None, shard=None):
        self.regularizer = regularizer
        self.of_bank = of_bank
        self.factor = 1 if shard is None else shard.count

    def __call__(self, bank):
        values = [] if self.of_bank is None else [self.of_bank(bank)]
        if self.regularizer is not None:
            values += [self.regularizer(bank[e]) for e in range(bank.shape[0])]
        return self.factor * sum(values)


class PerExpertConstraint(keras.constraints.Constraint):
    """Constrains each expert's weights separately."""

    def __init__(self, constraint):
        self.constraint = constraint

    def __call__(self, bank):
        return ops.stack(
            [self.constraint(bank[e]) for e in range(bank.shape[0])]
        )
