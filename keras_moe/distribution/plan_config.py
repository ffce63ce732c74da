"""Sizes of a language model from the configuration file it is published with.

Arithmetic only: the model is nowhere made.
"""

from keras_moe.checks import is_int
from keras_moe.distribution.plan_sizes import ModelSize
from keras_moe.distribution.plan_sizes import MoESize

REQUIRED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "vocab_size"),
)
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")


def size_of_config(config, sequence_length):
    """A `ModelSize` for tokens that attend to `sequence_length` others."""
    _check(config)
    get = config.get
    dim, layers = config["hidden_size"], config["num_hidden_layers"]
    vocab = config["vocab_size"]
    of_attention = _attention(config)
    num_experts = next((config[k] for k in EXPERTS if get(k)), 0)
    sparse = [_is_sparse(config, i) for i in range(layers)]
    num_sparse = sum(sparse) if num_experts else 0
    num_dense = layers - num_sparse
    dense_width = config["intermediate_size"]
    width = get("moe_intermediate_size") or dense_width
    shared = get("shared_expert_intermediate_size") or 0
    gate = dim if shared else 0  # the shared expert's own gate (Qwen2)
    shared = shared or (get("n_shared_experts") or 0) * width
    of_sparse = dim * num_experts + 3 * dim * shared + gate
    heads = 1 if get("tie_word_embeddings") else 2
    # Matrices that each token meets, in all layers and at the end.
    kernels = (
        layers * of_attention.kernels
        + num_dense * 3 * dim * dense_width
        + num_sparse * of_sparse
    )
    kept = sequence_length * (
        layers * (4 * dim + of_attention.kept)
        + num_dense * 3 * dense_width
        + num_sparse * (num_experts + 3 * shared)
        + 2 * dim
        + vocab
    )
    has_bias = get("topk_method") == "noaux_tc"
    moe = MoESize(
        name="moe",
        num_layers=num_sparse,
        num_experts=num_experts,
        rows_per_token=get("num_experts_per_tok") or 0,
        input_dim=dim,
        output_dim=dim,
        width=width,
        bank=3 * dim * width * num_experts,
        trained=True,
        products=3 * dim * width,
        kept_per_row=3 * width,
        kept_fused=2 * width,
        positions=sequence_length,
    )
    return ModelSize(
        weights=kernels
        + layers * (of_attention.others + 2 * dim)
        + dim
        + heads * vocab * dim,
        state=num_sparse * num_experts if has_bias else 0,
        products=sequence_length
        * (
            kernels
            + vocab * dim
            + layers * of_attention.per_pair * sequence_length
        ),
        kept=kept,
        kept_blocks=sequence_length * (layers * dim + 2 * dim + vocab),
        positions=sequence_length,
        moe=(moe,) if num_sparse else (),
    )


class _Attention:
    """Kernels, other weights, kept numbers a token, products a pair."""

    def __init__(self, kernels, others, kept, per_pair):
        self.kernels, self.others = kernels, others
        self.kept, self.per_pair = kept, per_pair


def _attention(config):
    get = config.get
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    if get("kv_lora_rank"):
        rope, nope = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
        v_dim, kv_rank = config["v_head_dim"], config["kv_lora_rank"]
        q_rank = get("q_lora_rank") or 0
        q_width, v_width = heads * (nope + rope), heads * v_dim
        kernels = (
            (dim * q_rank + q_rank * q_width if q_rank else dim * q_width)
            + dim * (kv_rank + rope)
            + kv_rank * heads * (nope + v_dim)
            + v_width * dim
        )
        kept = 2 * (q_rank + kv_rank) + rope + 2 * (q_width + v_width)
        return _Attention(kernels, q_rank + kv_rank, kept, q_width + v_width)
    head_dim = get("head_dim") or dim // heads
    q_width = heads * head_dim
    kv_width = (get("num_key_value_heads") or heads) * head_dim
    kernels = 2 * dim * (q_width + kv_width)
    others = 0
    if get("attention_bias"):
        others += q_width + 2 * kv_width + dim
    if get("model_type") == "qwen3_moe":  # norms of queries and keys
        others += 2 * head_dim
    return _Attention(kernels, others, 2 * (q_width + kv_width), 2 * q_width)


def _is_sparse(config, layer):
    step = config.get("decoder_sparse_step") or config.get("moe_layer_freq")
    return (
        layer >= (config.get("first_k_dense_replace") or 0)
        and layer not in (config.get("mlp_only_layers") or ())
        and (layer + 1) % (step or 1) == 0
    )


def _check(config):
    missing = [key for key in REQUIRED if not is_int(config.get(key))]
    has_experts = any(config.get(key) for key in EXPERTS)
    if has_experts and not is_int(config.get("num_experts_per_tok")):
        missing.append("num_experts_per_tok")
    if config.get("kv_lora_rank"):
        parts = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        missing += [key for key in parts if not is_int(config.get(key))]
    if missing:
        raise ValueError(
            "A configuration needs the entries "
            f"{', '.join(missing)}, as ints. Received: {sorted(config)}"
        )
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    latent_or_given = config.get("kv_lora_rank") or config.get("head_dim")
    kv_heads = config.get("num_key_value_heads") or heads
    for name, value, divisor_name, divisor, counts in (
        ("hidden_size", dim, "num_attention_heads", heads, not latent_or_given),
        ("num_attention_heads", heads, "num_key_value_heads", kv_heads, True),
    ):
        if counts and value % divisor:
            raise ValueError(
                f"`{name}` must be a multiple of `{divisor_name}`. Received: "
                f"{name}={value}, {divisor_name}={divisor}"
            )
