"""The gates of a `MultiGateMoE`, stacked."""

import keras
import numpy as np
from keras import ops

from keras_moe import backend
from keras_moe.recommendation.gates import gate_activations
from keras_moe.recommendation.gates.selector_gates import SelectorGates
from keras_moe.stacked.draws import own_draws
from keras_moe.stacked.per_expert import PerExpertInitializer
from keras_moe.stacked.stacked_mlp import StackedMLP


class TaskGates(keras.layers.Layer):
    """Weights of experts, `(B, D)` or `(B, G, D)` -> `(B, G, E)`.

    ```
    weights[:, g] = activation(mlp[g](x[:, g]) @ kernel[g].T + bias[g])
    ```

    A gate has weights only for the experts it sees. The `N` pairs of a gate and
    an expert it sees, gate by gate, are the rows of `kernel` `(N, D)`.

    Everything is in float32, as in a router.
    """

    def __init__(
        self,
        visible,
        units=(),
        use_bias=True,
        normalization=None,
        normalization_epsilon=1e-3,
        activation="softmax",
        top_k=2,
        gamma=1.0,
        entropy_weight=0.0,
        unused_code_weight=1.0,
        temperature=1.0,
        dropout=0.0,
        seed=None,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        dtype=None,
        **kwargs,
    ):
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        float64 = policy.compute_dtype == "float64"
        super().__init__(dtype="float64" if float64 else "float32", **kwargs)
        self.visible = np.array(visible, "bool")
        self.num_gates, self.num_experts = self.visible.shape
        self.use_bias = use_bias
        self.activation = activation
        self.top_k = top_k
        self.temperature = temperature
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.mlp = None
        if units:
            self.mlp = StackedMLP(
                self.num_gates,
                units,
                kernel_initializer=own_draws(self.kernel_initializer, 1),
                kernel_regularizer=self.kernel_regularizer,
                dtype=self.dtype_policy,
                name="mlp",
            )
        self.selectors = None
        if activation == "dselect_k":
            self.selectors = SelectorGates(
                self.visible,
                top_k,
                gamma,
                entropy_weight,
                unused_code_weight,
                seed=seed,
                dtype=self.dtype_policy,
                name="selectors",
            )
        self._normalize = None
        if normalization == "batch" and self.selectors is None:
            self._normalize = keras.layers.BatchNormalization(
                epsilon=normalization_epsilon,
                dtype=self.dtype_policy,
                name="normalization",
            )
        self._seed_generator = None
        if dropout > 0:
            self._seed_generator = keras.random.SeedGenerator(seed)
        # Where in the rows of the kernel each pair is; N where it is not.
        pairs = self.visible.sum()
        self._places = np.full(self.visible.shape, pairs, "int32")
        self._places[self.visible] = np.arange(pairs)
        self._pairs = np.flatnonzero(self.visible)

    def build(self, input_shape):
        if self.mlp is not None:
            self.mlp.build(input_shape)
            input_shape = self.mlp.compute_output_shape(input_shape)
        if self.selectors is not None:
            self.selectors.build(input_shape)
            return
        pairs = len(self._pairs)
        self.kernel = self.add_weight(
            name="kernel",
            shape=(pairs, input_shape[-1]),
            initializer=_PerGateInitializer(
                own_draws(self.kernel_initializer, 0),
                self.visible.sum(axis=-1).tolist(),
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
            logits = self._logits(x, training) / self.temperature
            weights = gate_activations.gate_weights(
                logits, self.visible, self.activation, self.top_k
            )
        if training and self.dropout > 0:
            weights = gate_activations.drop_gates(
                weights, self.dropout, self._seed_generator, self.activation
            )
        return weights

    def _logits(self, x, training):
        kernel = self._spread(self.kernel)  # (G * E, D)
        if len(x.shape) == 2:
            logits = ops.einsum("bd,nd->bn", x, kernel)
            logits = ops.reshape(logits, (-1, *self.visible.shape))
        else:
            shape = (*self.visible.shape, x.shape[-1])
            kernel = ops.reshape(kernel, shape)
            logits = ops.einsum("bgd,ged->bge", x, kernel)
        if self.bias is not None:
            logits = logits + ops.reshape(
                self._spread(self.bias), self.visible.shape
            )
        if self._normalize is None:
            return logits
        shape = (-1, self.num_gates * self.num_experts)
        logits = ops.reshape(logits, shape)
        seen = self._normalize(
            backend.take(logits, self._pairs, axis=1), training=training
        )
        logits = self._spread(seen, axis=1)
        return ops.reshape(logits, (-1, *self.visible.shape))

    def _spread(self, values, axis=0):
        """From an axis of `N` pairs to one of `G * E`, zero for all others."""
        if len(self._pairs) == self.visible.size:
            return values
        values = ops.convert_to_tensor(values)
        zero = ops.zeros_like(values[:1] if axis == 0 else values[:, :1])
        values = ops.concatenate([values, zero], axis=axis)
        return backend.take(values, self._places.reshape(-1), axis=axis)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.num_gates, self.num_experts)


class _PerGateInitializer(PerExpertInitializer):
    """Draws the kernel of each gate, `(D, experts it sees)`, on its own."""

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
