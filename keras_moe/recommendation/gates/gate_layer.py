"""From the parts of `TaskGates` to their weights."""

import keras
from keras import ops

from keras_moe.recommendation.gates import gate_activations
from keras_moe.recommendation.gates.visible_pairs import PerGateInitializer
from keras_moe.stacked.draws import own_draws


class GateLayer(keras.layers.Layer):
    """Gates: `(B, D)` or `(B, G, D)` -> `(B, G, E)`.

    `TaskGates` makes the parts:

    Attributes:
        visible: `(G, E)` boolean array, or `None` while it is unknown.
        mlp: `StackedMLP` of the hidden layers, or `None`.
        selectors: `SelectorGates` that replace the linear layer, or `None`.
    """

    def build(self, input_shape):
        if self.visible is None:
            raise ValueError(
                "TaskGates need `visible`, unless they are the `gates` of a "
                "MultiGateMoE. Received: visible=None"
            )
        if self.mlp is not None:
            self.mlp.build(input_shape)
            input_shape = self.mlp.compute_output_shape(input_shape)
        if self.selectors is not None:
            self.selectors.build(input_shape)
            return
        pairs = self._pairs.number
        self.kernel = self.add_weight(
            name="kernel",
            shape=(pairs, input_shape[-1]),
            initializer=PerGateInitializer(
                own_draws(self.kernel_initializer, 0), self._pairs.per_gate
            ),
            regularizer=self.kernel_regularizer,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias", shape=(pairs,), initializer="zeros"
            )
        if self._normalize is not None:
            self._normalize.build((None, pairs))

    def call(self, inputs, training=None):
        x = ops.cast(inputs, self.compute_dtype)
        if self.mlp is not None:
            x = self.mlp(x, training=training)
        if self.selectors is not None:
            weights = self.selectors(x, training=training)
        else:
            weights = self._weights(self._logits(x, training))
        if training and self.dropout > 0:
            weights = gate_activations.drop_gates(
                weights, self.dropout, self._seed_generator, self.activation
            )
        return weights

    def _weights(self, logits):
        return gate_activations.gate_weights(
            logits, self.visible, self.activation, self.top_k
        )

    def _logits(self, x, training):
        logits = self._pairs.logits(x, self.kernel, self.bias)
        if self._normalize is not None:
            seen = self._pairs.gather(logits)
            seen = self._normalize(seen, training=training)
            logits = self._pairs.spread(seen, axis=1)
            logits = ops.reshape(logits, (-1, *self.visible.shape))
        return logits / self.temperature

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.num_gates, self.num_experts)
