"""Weights of a unit's own experts, added to the weights of its gate."""

import keras
import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.checks import check_one_of
from keras_moe.recommendation.gates.gate_activations import self_gate_weights
from keras_moe.recommendation.gates.task_gates import TaskGates
from keras_moe.stacked.draws import own_draws
from keras_moe.stacked.draws import own_seed


class ResidualWeights(keras.layers.Layer):
    """AdaTT's weights of each unit's own experts, the same for all inputs.

    `(B, ...)` -> `(G, E)`. The weights of a unit with `n` experts start between
    `-n ** -0.5` and `n ** -0.5`. If no unit has several experts, all weights
    are the constant 1.
    """

    def __init__(self, own, is_learned, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.own = np.array(own, "bool")
        self.is_learned = is_learned
        self.seed = seed

    def build(self, inputs_shape):
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

    def call(self, inputs):
        if not self.is_learned:
            return ops.convert_to_tensor(self.own, self.compute_dtype)
        places = np.zeros(self.own.shape, "int32")
        places[self.own] = np.arange(self.own.sum())
        weights = ops.convert_to_tensor(self.weight)
        weights = backend.take(weights, places.reshape(-1))
        weights = ops.reshape(weights, self.own.shape)
        return ops.where(self.own, weights, ops.zeros_like(weights))


class SelfGates(TaskGates):
    """The second gate of each unit in HoME, over the unit's own experts."""

    may_see_nothing = True

    def _weights(self, logits):
        return self_gate_weights(logits, self.visible)


def make_residual(kind, units, gates, seed, dtype):
    """The layer whose weights a `MultiGateMoE` adds to its gates, or `None`.

    Args:
        kind: `None`, `"weights"` or `"gates"`.
        units: `ExpertUnits`.
        gates: `TaskGates`. Self gates take over their bias, initializer and
            regularizer.
        seed: int, or `None`. Seed of the layer.
        dtype: dtype policy of the layer.
    """
    check_one_of("self_residual", kind, (None, "weights", "gates"))
    if kind is None or not units.own.any():
        return None
    if kind == "weights":
        return ResidualWeights(
            units.own,
            is_learned=units.has_several_somewhere,
            seed=own_seed(seed, 2),
            dtype=gates.dtype_policy,
            name="residual",
        )
    residual = SelfGates(
        use_bias=gates.use_bias,
        kernel_initializer=own_draws(gates.kernel_initializer, 2),
        kernel_regularizer=gates.kernel_regularizer,
        dtype=dtype,
        name="residual",
    )
    residual.set_visible(units.own)
    return residual
