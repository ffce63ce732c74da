"""Attention, and the feed-forward network of two layers beside it."""

import keras

from keras_moe.checks import as_keras_object
from keras_moe.ops import activations


@keras.saving.register_keras_serializable("keras_moe")
class VisionAttention(keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` that may normalize queries and keys.

    With `qk_norm` each head's query and key go through a layer norm with a gain
    and no bias, before their product (Dehghani et al., 2023, section 2.2).
    """

    def __init__(self, *args, qk_norm=False, qk_norm_epsilon=1e-6, **kwargs):
        super().__init__(*args, **kwargs)
        self.qk_norm = qk_norm
        self.qk_norm_epsilon = qk_norm_epsilon
        self.query_norm = self.key_norm = None
        if qk_norm:
            self.query_norm, self.key_norm = (
                keras.layers.LayerNormalization(
                    epsilon=qk_norm_epsilon,
                    center=False,
                    dtype=self.dtype_policy,
                    name=name,
                )
                for name in ("query_norm", "key_norm")
            )

    def build(self, query_shape, value_shape, key_shape=None):
        super().build(query_shape, value_shape, key_shape)
        if self.qk_norm:
            shape = (None, None, self.num_heads, self.key_dim)
            self.query_norm.build(shape)
            self.key_norm.build(shape)

    def _compute_attention(self, query, key, value, *args, **kwargs):
        # Keras names this method as the place to change the attention of
        # projected queries, keys and values.
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return super()._compute_attention(query, key, value, *args, **kwargs)

    def get_config(self):
        return {
            **super().get_config(),
            "qk_norm": self.qk_norm,
            "qk_norm_epsilon": self.qk_norm_epsilon,
        }


@keras.saving.register_keras_serializable("keras_moe")
class VisionMLP(keras.layers.Layer):
    """`dense_2(activation(dense_1(x)))`, with dropout after each."""

    def __init__(
        self,
        intermediate_dim,
        activation="gelu_tanh",
        dropout=0.0,
        use_output_bias=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.intermediate_dim = intermediate_dim
        self.activation = as_keras_object(
            "activation", activations.get, activation
        )
        self.dropout = dropout
        self.use_output_bias = use_output_bias
        self.dense_1 = keras.layers.Dense(
            intermediate_dim,
            activation=self.activation,
            dtype=self.dtype_policy,
            name="dense_1",
        )
        self.dropout_layer = keras.layers.Dropout(
            dropout, dtype=self.dtype_policy, name="dropout"
        )

    def build(self, input_shape):
        self.dense_2 = keras.layers.Dense(
            input_shape[-1],
            use_bias=self.use_output_bias,
            dtype=self.dtype_policy,
            name="dense_2",
        )
        self.dense_1.build(input_shape)
        self.dense_2.build((*input_shape[:-1], self.intermediate_dim))

    def call(self, inputs, training=None):
        x = self.dropout_layer(self.dense_1(inputs), training=training)
        return self.dropout_layer(self.dense_2(x), training=training)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "activation": activations.serialize(self.activation),
            "dropout": self.dropout,
            "use_output_bias": self.use_output_bias,
        }
