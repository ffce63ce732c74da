"""Counts weights by their shapes; the MoE blocks are the library's layers."""

import dataclasses
import functools
import math
from typing import NamedTuple

import keras

from keras_moe.experts import GLUExperts
from keras_moe.experts import MLPExperts
from keras_moe.layers import MoE
from keras_moe.routers import TopKRouter

BANKS = {"glu": GLUExperts, "mlp": MLPExperts}


class Drawn(Exception):
    """Somebody asked for the values of weights that must not exist."""


def refuse(shape, dtype=None):
    """An initializer that proves nothing was allocated: it was not called."""
    raise Drawn(f"weights of shape {shape} were drawn")


@dataclasses.dataclass(frozen=True)
class Block:
    """One MoE feed-forward block."""

    dim: int
    num_experts: int
    top_k: int
    intermediate_dim: int
    bank: str = "glu"
    use_bias: bool = False
    router_bias: bool = False
    # The non-trainable bias of the selection (DeepSeek-V3): a buffer.
    expert_bias: bool = False
    shared_dim: int = 0
    shared_gate: bool = False

    def layer(self, initializer=refuse):
        bank = functools.partial(
            BANKS[self.bank],
            use_bias=self.use_bias,
            kernel_initializer=initializer,
            bias_initializer=initializer,
        )
        return MoE(
            router=TopKRouter(
                self.num_experts,
                self.top_k,
                score_activation="sigmoid" if self.expert_bias else "softmax",
                expert_bias=self.expert_bias,
                use_bias=self.router_bias,
                kernel_initializer=initializer,
                bias_initializer=initializer,
            ),
            experts=bank(self.num_experts, self.intermediate_dim),
            shared_experts=bank(1, self.shared_dim)
            if self.shared_dim
            else None,
            shared_experts_mode="gate" if self.shared_gate else "add",
        )


def build_without_values(layer, dim):
    """Builds a layer whose variables have shapes and no values."""
    try:
        with keras.StatelessScope(initialize_variables=False):
            layer.build((None, dim))
    finally:
        # Keras remembers variables without values, and would initialize them
        # when the next scope of this kind ends.
        keras.utils.clear_session(free_memory=False)
    return layer


def num_weights(variables):
    return sum(math.prod(v.shape) for v in variables)


class Count(NamedTuple):
    total: int  # trainable weights
    active: int  # those that one token uses
    buffers: int  # the expert bias; the counters of statistics are no part


@functools.cache
def count(block):
    layer = build_without_values(block.layer(), block.dim)
    total = num_weights(layer.trainable_variables)
    bank = num_weights(layer.experts.trainable_variables)
    per_expert = bank // block.num_experts
    return Count(
        total,
        total - (block.num_experts - block.top_k) * per_expert,
        num_weights(
            v
            for v in layer.router.non_trainable_variables
            if v.name == "expert_bias"
        ),
    )
