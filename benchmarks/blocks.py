"""The layers that are measured side by side."""

import keras
import numpy as np
from keras import ops

from keras_moe.layers import MoE


class DenseGLU(keras.layers.Layer):
    """The dense twin: as wide as all experts of one token together."""

    def __init__(self, shape, **kwargs):
        super().__init__(**kwargs)
        width = shape.top_k * shape.intermediate_dim
        dense = keras.layers.Dense
        self.gate = dense(
            width, "silu", use_bias=False, dtype=self.dtype_policy
        )
        self.up = dense(width, use_bias=False, dtype=self.dtype_policy)
        self.down = dense(shape.dim, use_bias=False, dtype=self.dtype_policy)

    def build(self, input_shape):
        self.gate.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.gate.units))

    def call(self, x, training=None):
        return self.down(self.gate(x) * self.up(x))


class AllExperts(keras.layers.Layer):
    """What one writes without a library: all experts for all tokens."""

    def __init__(self, shape, **kwargs):
        super().__init__(**kwargs)
        self.shape = shape

    def build(self, input_shape):
        _, dim, width, num_experts, _ = self.shape
        self.router = self.add_weight(name="router", shape=(dim, num_experts))
        self.gate = self.add_weight(
            name="gate", shape=(num_experts, dim, width)
        )
        self.up = self.add_weight(name="up", shape=(num_experts, dim, width))
        self.down = self.add_weight(
            name="down", shape=(num_experts, width, dim)
        )

    def call(self, x, training=None):
        probs = ops.softmax(ops.matmul(x, self.router))
        weights, indices = ops.top_k(probs, self.shape.top_k)
        weights = weights / ops.sum(weights, axis=-1, keepdims=True)
        chosen = ops.one_hot(indices, self.shape.num_experts, dtype=x.dtype)
        weights = ops.einsum("tk,tke->te", weights, chosen)
        gate = ops.einsum("td,edf->tef", x, self.gate)
        hidden = ops.silu(gate) * ops.einsum("td,edf->tef", x, self.up)
        return ops.einsum("te,tef,efd->td", weights, hidden, self.down)


def moe(shape, skewed=False, **kwargs):
    layer = MoE(
        shape.num_experts, shape.intermediate_dim, shape.top_k, **kwargs
    )
    layer.build((None, shape.dim))
    if skewed:
        kernel = ops.convert_to_numpy(layer.router.kernel).copy()
        kernel[0] = 0
        kernel[0, 0] = 8  # the first feature decides about the first expert
        layer.router.kernel.assign(kernel)
    return layer


def inputs(shape, skewed=False):
    """Tokens `(T, D)`; if skewed, half of them want expert 0."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(shape.tokens, shape.dim)).astype("float32")
    if skewed:
        tokens[:, 0] = np.arange(shape.tokens) % 2 * 2 - 1
    return tokens


def keras_hub_block(shape):
    """keras-hub's Qwen3-MoE block, or `None` where it is not installed."""
    try:
        import keras_hub
    except ImportError:
        return None
    backbone = keras_hub.models.Qwen3MoeBackbone(
        vocabulary_size=2,
        num_layers=1,
        num_query_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        hidden_dim=shape.dim,
        intermediate_dim=8,
        moe_intermediate_dim=shape.intermediate_dim,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        norm_top_k_prob=True,
    )
    # The block has no public name of its own.
    return Batched(backbone.transformer_layers[0].mlp)


class Batched(keras.layers.Layer):
    """Tokens as one sequence, and the outputs alone, of another's block."""

    def __init__(self, block, **kwargs):
        super().__init__(**kwargs)
        self.block = block

    def call(self, x, training=None):
        outputs = self.block(ops.expand_dims(x, 0), training=training)
        if isinstance(outputs, (list, tuple)):
            outputs = outputs[0]
        return ops.squeeze(outputs, 0)


def transformers_block(shape, implementation):
    """HF transformers' Qwen3-MoE block (torch), or `None` without it."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe import modeling_qwen3_moe
    except ImportError:
        return None
    config = Qwen3MoeConfig(
        hidden_size=shape.dim,
        moe_intermediate_size=shape.intermediate_dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)
    for weights in block.parameters():
        weights.data.normal_(std=shape.dim**-0.5)
    return block
