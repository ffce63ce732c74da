"""Published systems: their sizes, and what is known of their parameters.

How sure a number is (`mark`), as in the notes this was made from:

- `"run"`: counted on somebody else's implementation.
- `"calc"`: computed from the configuration before and apart from this code.
- `"seen"`: published, and read again for this file, in a stored copy of the
  source, or quoted from it by others ("quoted").
- `"mem"`: from memory of the paper. Kept for the reader, never asserted.

The sizes come from the released configuration files, for GLaM and the vision
models from the tables in the papers. Some of them (heads and vocabularies of
Mixtral, OLMoE and Qwen1.5-MoE, head width and vocabulary of GLaM) are from
memory too: they are as sure as the counts that they give.
"""

import functools
from typing import NamedTuple

from tests.published.counting import Block
from tests.published.models import attention
from tests.published.models import decoder_only
from tests.published.models import deepseek
from tests.published.models import glam
from tests.published.models import gpt_oss
from tests.published.models import mixtral
from tests.published.models import qwen3
from tests.published.models import soft_moe
from tests.published.models import switch
from tests.published.models import switch_base
from tests.published.models import v_moe

M, B, T = 10**6, 10**9, 10**12


class Figure(NamedTuple):
    """What somebody says a count is."""

    count: str  # a property of Counts
    value: int | float
    mark: str
    unit: int = 1  # the place of the last digit given
    source: str = "notes"
    differs: str = ""  # why it is not reproduced, if it is not


CARD = "table 1 of the model card"

SYSTEMS = {
    # Every second block sparse, 32,128 words in one table for both ends.
    "switch_base_8": (
        lambda: switch_base(8),
        Figure("total", 619_339_008, "run"),
    ),
    "switch_base": (
        lambda: switch_base(128),
        Figure("total", 7_415_217_408, "run"),
        Figure("total", 7.4 * B, "mem", B // 10, "paper"),
    ),
    "switch_base_256": (
        lambda: switch_base(256),
        Figure("total", 14_664_154_368, "run"),
    ),
    "switch_large": (
        lambda: switch(1024, 4096, 128, layers=24, sparse_layers=12, heads=16),
        Figure("total", 26.31 * B, "calc", B // 100),
        Figure("total", 26.3 * B, "mem", B // 10, "paper"),
    ),
    # The gin file has a head of its own; the notes counted without one. The
    # paper's table prints 64 experts, which gives 201B: 128 give its 395B.
    "switch_xxl": (
        lambda: switch(
            4096,
            10240,
            128,
            "glu",
            layers=24,
            sparse_layers=12,
            heads=64,
            tied=False,
        ),
        Figure("total", 395 * B, "seen", B, "abstract of the paper, quoted"),
    ),
    "switch_xxl_tied": (
        lambda: switch(
            4096, 10240, 128, "glu", layers=24, sparse_layers=12, heads=64
        ),
        Figure("total", 394.5 * B, "calc", B // 10),
    ),
    # Every block sparse, 30 heads and a head of its own (gin; the paper says
    # 32 heads, which is another 48M, and not seen in what it prints).
    "switch_c": (
        lambda: switch(
            2080,
            6144,
            2048,
            layers=15,
            sparse_layers=15,
            heads=30,
            tied=False,
        ),
        Figure("total", 1571.3 * B, "calc", B // 10),
        Figure("total", 1571 * B, "seen", B, "table 9 of the paper, quoted"),
    ),
    "glam_64b_64e": (
        glam,
        Figure("total", 1.16 * T, "calc", T // 100),
        Figure("total", 1.2 * T, "seen", T // 10, "paper, quoted"),
        Figure("active", 96.6 * B, "seen", B // 10, "paper, quoted"),
    ),
    # Every fourth block sparse. That 256,000 words are in one table is a guess
    # of the notes.
    "st_moe_32b": (
        lambda: switch(
            5120,
            20480,
            64,
            "glu",
            layers=24,
            sparse_layers=6,
            heads=64,
            head_dim=128,
            vocab=256000,
        ),
        Figure("total", 266.3 * B, "calc", B // 10),
        Figure(
            "total",
            269 * B,
            "seen",
            B,
            "abstract of the paper",
            differs="the vocabulary is a guess, and the paper may have dense "
            "blocks beside the sparse ones, which the gin file has not",
        ),
    ),
    "mixtral_8x7b": (
        lambda: mixtral(4096, 14336, 32, 32, vocab=32000),
        Figure("total", 46_702_792_704, "run"),
        Figure("active", 12_879_925_248, "calc"),
        Figure("total", 46.7 * B, "seen", B // 10, "announcement, quoted"),
        Figure("active", 12.9 * B, "seen", B // 10, "announcement, quoted"),
    ),
    # With 32,768 words, as in the later tokenizer; 32,000 are 9.4M fewer.
    "mixtral_8x22b": (
        lambda: mixtral(6144, 16384, 56, 48, vocab=32768),
        Figure("total", 140_630_071_296, "run"),
        Figure("active", 39_161_468_928, "calc"),
        Figure("total", 141 * B, "seen", B, "announcement, quoted"),
        Figure("active", 39 * B, "seen", B, "announcement, quoted"),
    ),
    # The notes' active counts of DeepSeek-V3 and Kimi K2 contain the buffers.
    "deepseek_v3": (
        lambda: deepseek(256, 128, dense_layers=3, vocab=129280),
        Figure("total", 671_026_404_352, "run"),
        Figure("buffers", 14_848, "run"),
        Figure("active_with_buffers", 37_552_297_472, "calc"),
        Figure("total", 671 * B, "seen", B, "README of the weights"),
        Figure(
            "active_without_input_embedding",
            37 * B,
            "seen",
            B,
            "README of the repository",
        ),
        Figure(
            "active",
            36.7 * B,
            "seen",
            B // 10,
            "README of the weights",
            differs="it says that both embeddings are counted, but it is "
            "closer to the count without one of them, 36.6B",
        ),
    ),
    "kimi_k2": (
        lambda: deepseek(384, 64, dense_layers=1, vocab=163840),
        Figure("total_with_buffers", 1_026_408_232_448, "calc"),
        Figure("buffers", 23_040, "calc"),
        Figure("active_with_buffers", 32_861_500_928, "calc"),
        Figure(
            "active_without_input_embedding",
            32 * B,
            "seen",
            B,
            "model card, quoted",
        ),
        Figure(
            "total",
            1.04 * T,
            "seen",
            T // 100,
            "pages on the technical report",
            differs="for an unknown reason: the configuration gives 1.03T",
        ),
        Figure("active", 32.6 * B, "mem", B // 10, "technical report"),
    ),
    "qwen3_30b_a3b": (
        lambda: qwen3(2048, 768, 48, 32),
        Figure("total", 30_532_122_624, "calc"),
        Figure("active", 3_353_032_704, "calc"),
        Figure("total", 30.5 * B, "seen", B // 10, "card of the 2507s"),
        Figure("total_without_embeddings", 29.9 * B, "seen", B // 10, "card"),
        Figure(
            "active",
            3.3 * B,
            "seen",
            B // 10,
            "model card",
            differs="the card cuts 3.35 off where others round it",
        ),
    ),
    "qwen3_235b_a22b": (
        lambda: qwen3(4096, 1536, 94, 64),
        Figure("total", 235_093_634_560, "calc"),
        Figure("active", 22_190_763_520, "calc"),
        Figure("total", 235 * B, "seen", B, "name of the model"),
        Figure("active", 22 * B, "seen", B, "name of the model"),
    ),
    "qwen1_5_moe_a2_7b": (
        lambda: decoder_only(
            Block(2048, 60, 4, 1408, shared_dim=5632, shared_gate=True),
            24,
            attention(2048, 16, 128, bias="qkv"),
            151936,
        ),
        Figure("total", 14_315_784_192, "calc"),
        Figure("active", 2_689_173_504, "calc"),
        Figure("active", 2.7 * B, "seen", B // 10, "name of the model"),
    ),
    # The norms of queries and keys are over all heads at once.
    "olmoe_1b_7b": (
        lambda: decoder_only(
            Block(2048, 64, 8, 1024),
            16,
            attention(2048, 16, 128, qk_norm=2 * 2048),
            50304,
        ),
        Figure("total", 6_919_161_856, "calc"),
        Figure("active", 1_282_017_280, "calc"),
        Figure("total", 6.9 * B, "seen", B // 10, "paper, quoted"),
        Figure("active", 1.3 * B, "seen", B // 10, "paper, quoted"),
    ),
    "gpt_oss_120b": (
        lambda: gpt_oss(128, layers=36),
        Figure("total", 116.83 * B, "seen", B // 100, CARD),
        Figure("moe", 114.71 * B, "seen", B // 100, CARD),
        Figure("attention", 0.96 * B, "seen", B // 100, CARD),
        Figure(
            "active_without_input_embedding",
            5.13 * B,
            "seen",
            B // 100,
            CARD,
        ),
    ),
    "gpt_oss_20b": (
        lambda: gpt_oss(32, layers=24),
        Figure("total", 20.91 * B, "seen", B // 100, CARD),
        Figure("moe", 19.12 * B, "seen", B // 100, CARD),
        Figure("attention", 0.64 * B, "seen", B // 100, CARD),
        Figure(
            "active_without_input_embedding",
            3.61 * B,
            "seen",
            B // 100,
            CARD,
        ),
    ),
    # Of 32 experts each; the last six are without experts (dense ViT).
    **{
        f"v_moe_{size.lower()}{patch}_{moe_layers}": (
            functools.partial(v_moe, size, patch, moe_layers),
            Figure("total", value, "calc", unit),
        )
        for size, patch, moe_layers, value, unit in (
            ("S", 32, 4, 296_895_347, 1),
            ("S", 32, 2, 166.68 * M, M // 100),
            ("B", 32, 6, 980_631_411, 1),
            ("B", 32, 2, 394.95 * M, M // 100),
            ("B", 16, 6, 978_974_835, 1),
            ("B", 16, 2, 393.29 * M, M // 100),
            ("L", 32, 12, 3_448_168_307, 1),
            ("L", 32, 2, 845.8 * M, M // 10),
            ("L", 16, 12, 3_445_959_539, 1),
            ("L", 16, 5, 1624.29 * M, M // 100),
            ("L", 16, 2, 843.6 * M, M // 10),
            ("H", 14, 16, 7_160_836_211, 1),
            ("H", 14, 5, 2688.65 * M, M // 100),
            ("S", 32, 0, 36.47 * M, M // 100),
            ("B", 32, 0, 102.11 * M, M // 100),
            ("B", 16, 0, 100.46 * M, M // 100),
            ("L", 32, 0, 325.31 * M, M // 100),
            ("L", 16, 0, 323.10 * M, M // 100),
            ("H", 14, 0, 655.84 * M, M // 100),
        )
    },
    # The checkpoints that were released, without their head.
    "v_moe_s32_e8_last2": (
        lambda: v_moe("S", 32, 2, num_experts=8, head=0),
        Figure("total", 56.2 * M, "calc", M // 10),
    ),
    "v_moe_b16_e8_every2": (
        lambda: v_moe("B", 16, 6, num_experts=8, head=0),
        Figure("total", 284 * M, "calc", M),
    ),
    # The notes say "body", and not what that is: all five figures count the
    # encoder alone, without patches and positions.
    "soft_moe_s16_128e": (
        lambda: soft_moe("S", 16, 128),
        Figure("body", 0.922 * B, "calc", M),
    ),
    "soft_moe_b16_128e": (
        lambda: soft_moe("B", 16, 128),
        Figure("body", 3.684 * B, "calc", M),
        Figure("total", 3.7 * B, "mem", B // 10, "paper"),
    ),
    "soft_moe_l16_128e": (
        lambda: soft_moe("L", 16, 128),
        Figure("body", 13.096 * B, "calc", M),
        Figure("total", 13.1 * B, "mem", B // 10, "paper"),
    ),
    "soft_moe_h14_128e": (
        lambda: soft_moe("H", 14, 128, slots=2),
        Figure("body", 27.282 * B, "calc", M),
        Figure("total", 27.3 * B, "mem", B // 10, "paper"),
    ),
    "soft_moe_h14_256e": (
        lambda: soft_moe("H", 14, 256),
        Figure("body", 54.138 * B, "calc", M),
        Figure("total", 54 * B, "seen", B, "paper, quoted"),
        Figure("total", 54.1 * B, "mem", B // 10, "paper"),
    ),
}
