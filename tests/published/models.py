"""Plain arithmetic for all of a model but its MoE blocks."""

import dataclasses

from tests.published.counting import Block
from tests.published.counting import count


@dataclasses.dataclass(frozen=True)
class Counts:
    """Trainable weights by kind, and the buffers apart."""

    moe: int = 0
    active_moe: int = 0
    buffers: int = 0
    attention: int = 0
    dense: int = 0  # dense feed-forward blocks
    norms: int = 0
    input_embedding: int = 0  # patches, positions; the head's too if tied
    head: int = 0

    @property
    def total(self):
        return self.active - self.active_moe + self.moe

    @property
    def active(self):
        """What one token uses, and the whole of both embeddings."""
        body = self.active_moe + self.attention + self.dense + self.norms
        return body + self.input_embedding + self.head

    @property
    def body(self):
        return self.total_without_embeddings

    @property
    def total_without_embeddings(self):
        return self.total - self.input_embedding - self.head

    @property
    def active_without_input_embedding(self):
        """A row of the input embedding is looked up. Only for untied heads."""
        return self.active - self.input_embedding

    @property
    def total_with_buffers(self):
        return self.total + self.buffers

    @property
    def active_with_buffers(self):
        return self.active + self.buffers


def attention(dim, heads, head_dim, kv_heads=None, bias="", qk_norm=0):
    """Four projections; `bias` names those that have one."""
    widths = {
        "q": heads * head_dim,
        "k": (kv_heads or heads) * head_dim,
        "v": (kv_heads or heads) * head_dim,
    }
    kernels = dim * (sum(widths.values()) + heads * head_dim)
    biases = sum(({**widths, "o": dim})[name] for name in bias)
    return kernels + biases + qk_norm


def latent_attention(
    dim, heads, q_rank=1536, kv_rank=512, rope=64, nope=128, v_dim=128
):
    """DeepSeek's multi-head latent attention, with its two norms."""
    q = dim * q_rank + q_rank + q_rank * heads * (nope + rope)
    kv = dim * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + v_dim)
    return q + kv + heads * v_dim * dim


def decoder_only(
    block, layers, attention, vocab, dense_layers=0, dense_dim=0, tied=False
):
    """Two RMS norms a layer and one at the end, gated dense blocks, no bias."""
    moe, active, buffers = count(block)
    sparse = layers - dense_layers
    return Counts(
        moe=sparse * moe,
        active_moe=sparse * active,
        buffers=sparse * buffers,
        attention=layers * attention,
        dense=dense_layers * 3 * block.dim * dense_dim,
        norms=(2 * layers + 1) * block.dim,
        input_embedding=vocab * block.dim,
        head=0 if tied else vocab * block.dim,
    )


def encoder_decoder(
    block, layers, sparse_layers, heads, head_dim=64, vocab=32128, tied=True
):
    """T5: as many decoder as encoder layers, which also attend across.

    Each stack has one table of relative position biases (32 buckets), and a
    norm at its end. Dense blocks are like the experts, without biases.
    """
    moe, active, _ = count(block)
    kernels = 3 if block.bank == "glu" else 2
    one_dense = kernels * block.dim * block.intermediate_dim
    one_attention = attention(block.dim, heads, head_dim)
    return Counts(
        moe=2 * sparse_layers * moe,
        active_moe=2 * sparse_layers * active,
        attention=3 * layers * one_attention + 2 * 32 * heads,
        dense=2 * (layers - sparse_layers) * one_dense,
        norms=(5 * layers + 2) * block.dim,
        input_embedding=vocab * block.dim,
        head=0 if tied else vocab * block.dim,
    )


def vision_transformer(
    moe,
    active_moe,
    moe_layers,
    dim,
    intermediate_dim,
    layers,
    patch,
    head,
    token=True,
):
    """ViT on 224 x 224 pixels: everything has a bias, norms have two weights.

    `head` is the number of classes, behind a layer of width `dim`; 0 is none.
    """
    positions = (224 // patch) ** 2 + token
    dense = 2 * dim * intermediate_dim + intermediate_dim + dim
    return Counts(
        moe=moe_layers * moe,
        active_moe=moe_layers * active_moe,
        attention=layers * 4 * (dim * dim + dim),
        dense=(layers - moe_layers) * dense,
        norms=(2 * layers + 1) * 2 * dim,
        input_embedding=(3 * patch**2 + 1 + token + positions) * dim,
        head=(dim + 1) * (dim + head) if head else 0,
    )


# dim, intermediate_dim, layers. V-MoE's S is not the usual one.
VIT = {
    "S": (512, 2048, 8),
    "B": (768, 3072, 12),
    "L": (1024, 4096, 24),
    "H": (1280, 5120, 32),
}


def v_moe(size, patch, moe_layers, num_experts=32, head=18291):
    """V-MoE. The head is for JFT-300M."""
    dim, intermediate_dim, layers = VIT[size]
    block = Block(
        dim, num_experts, 2, intermediate_dim, bank="mlp", use_bias=True
    )
    moe, active, _ = count(block)
    return vision_transformer(
        moe, active, moe_layers, dim, intermediate_dim, layers, patch, head
    )


def soft_moe(size, patch, num_experts, slots=1):
    """Soft MoE in the last half of the layers; no class token, no head.

    `phi` `(D, E, P)` and one scale are plain arithmetic, and stand in for the
    router of a block of the library.
    """
    dim, intermediate_dim, layers = {**VIT, "S": (384, 1536, 12)}[size]
    block = Block(
        dim, num_experts, 1, intermediate_dim, bank="mlp", use_bias=True
    )
    moe = count(block).total - dim * num_experts
    moe += dim * num_experts * slots + 1
    return vision_transformer(
        moe,
        moe,
        layers // 2,
        dim,
        intermediate_dim,
        layers,
        patch,
        head=0,
        token=False,
    )


def glam(layers=64, dim=8192, intermediate_dim=32768, heads=128, vocab=256000):
    """GLaM 64B/64E: every second layer sparse, one table of embeddings.

    The experts have two kernels and the dense blocks three: with three kernels
    in the experts there would be 1.71T weights. Two norms a layer, and one at
    the end; position biases are left out, they are too few to be seen.
    """
    block = Block(dim, 64, 2, intermediate_dim, bank="mlp")
    return decoder_only(
        block,
        layers,
        attention(dim, heads, head_dim=128),
        vocab,
        dense_layers=layers // 2,
        dense_dim=intermediate_dim,
        tied=True,
    )


def switch(dim, intermediate_dim, num_experts, bank="mlp", **sizes):
    block = Block(dim, num_experts, 1, intermediate_dim, bank)
    return encoder_decoder(block, **sizes)


def switch_base(num_experts):
    return switch(768, 3072, num_experts, layers=12, sparse_layers=6, heads=12)


def mixtral(dim, intermediate_dim, layers, heads, vocab):
    return decoder_only(
        Block(dim, 8, 2, intermediate_dim),
        layers,
        attention(dim, heads, 128, kv_heads=8),
        vocab,
    )


def deepseek(num_experts, heads, dense_layers, vocab):
    return decoder_only(
        Block(7168, num_experts, 8, 2048, expert_bias=True, shared_dim=2048),
        61,
        latent_attention(7168, heads),
        vocab,
        dense_layers=dense_layers,
        dense_dim=18432,
    )


def qwen3(dim, intermediate_dim, layers, heads):
    return decoder_only(
        Block(dim, 128, 8, intermediate_dim),
        layers,
        attention(dim, heads, 128, kv_heads=4, qk_norm=2 * 128),
        151936,
    )


def gpt_oss(num_experts, layers):
    sinks = 64
    return decoder_only(
        Block(2880, num_experts, 4, 2880, use_bias=True, router_bias=True),
        layers,
        attention(2880, 64, 64, kv_heads=8, bias="qkvo") + sinks,
        201088,
    )
