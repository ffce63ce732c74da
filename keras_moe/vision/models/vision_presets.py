"""Published configurations; no weights come with them."""

# hidden_dim, mlp_dim, num_layers, num_heads. V-MoE's S is not the usual one.
_VMOE_SIZES = {
    "s": (512, 2048, 8, 8),
    "b": (768, 3072, 12, 12),
    "l": (1024, 4096, 24, 16),
    "h": (1280, 5120, 32, 16),
}
_SIZES = {**_VMOE_SIZES, "s": (384, 1536, 12, 6)}


def _preset(description, sizes, patch_size, **options):
    hidden_dim, mlp_dim, num_layers, num_heads = sizes
    config = {
        "image_shape": (224, 224, 3),
        "data_format": "channels_last",
        "patch_size": patch_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "hidden_dim": hidden_dim,
        "mlp_dim": mlp_dim,
        **options,
    }
    return {"description": description, "config": config}


def _vmoe(size, patch, moe_layers, num_experts):
    name = f"v_moe_{size}{patch}_e{num_experts}_{moe_layers}"
    where = moe_layers.replace("_", " ").replace("every 2", "every second")
    return name, _preset(
        f"V-MoE-{size.upper()}/{patch}, 2 of {num_experts} experts in the "
        f"{where} of the blocks that may have them (Riquelme et al., 2021).",
        _VMOE_SIZES[size],
        patch,
        num_experts=num_experts,
        moe_layers=moe_layers,
    )


def _soft_moe(size, patch, num_experts, slots):
    return f"soft_moe_{size}{patch}_e{num_experts}", _preset(
        f"Soft MoE {size.upper()}/{patch}, {num_experts} experts of {slots} "
        "slots in the second half of the blocks (Puigcerver et al., 2023).",
        _SIZES[size],
        patch,
        num_experts=num_experts,
        slots_per_expert=slots,
    )


VMOE = dict(
    _vmoe(*arguments)
    for arguments in (
        ("s", 32, "last_2", 8),  # a released checkpoint
        ("b", 16, "every_2", 8),  # a released checkpoint
        ("s", 32, "last_2", 32),
        ("s", 32, "every_2", 32),
        ("b", 32, "last_2", 32),
        ("b", 32, "every_2", 32),
        ("b", 16, "last_2", 32),
        ("b", 16, "every_2", 32),
        ("l", 32, "last_2", 32),
        ("l", 32, "every_2", 32),
        ("l", 16, "last_2", 32),
        ("l", 16, "last_5", 32),
        ("l", 16, "every_2", 32),
        ("h", 14, "last_5", 32),
        ("h", 14, "every_2", 32),
    )
)
# Its checkpoint is released, and fine-tuned with this capacity.
VMOE["v_moe_s32_e8_last_2_m2"] = _preset(
    "E3-S/32, an ensemble of 2 members with 1 of 4 experts each in the last 2 "
    "of the blocks that may have them (Allingham et al., 2021).",
    _VMOE_SIZES["s"],
    32,
    num_experts=8,
    moe_layers="last_2",
    top_k=1,
    capacity_factor=1.5,
    ensemble_size=2,
)
SOFT_MOE = dict(
    _soft_moe(*arguments)
    for arguments in (
        ("s", 16, 128, 1),
        ("s", 14, 256, 1),
        ("b", 16, 128, 1),
        ("l", 16, 128, 1),
        ("h", 14, 128, 2),
        ("h", 14, 256, 1),
    )
)


def _dit_moe(size, num_experts, hidden_dim, num_layers, num_heads):
    return f"dit_moe_{size}2_e{num_experts}", _preset(
        f"DiT-MoE-{size.upper()}/2, 2 of {num_experts} experts and 2 shared "
        "ones in each block, for the latents of 256 x 256 images of the "
        "classes of ImageNet (Fei et al., 2024).",
        (hidden_dim, 4 * hidden_dim, num_layers, num_heads),
        2,
        image_shape=(32, 32, 4),
        num_classes=1000,
        num_experts=num_experts,
        group_size=None,
        learn_sigma=True,
    )


DIT_MOE = dict(
    _dit_moe(*arguments)
    for arguments in (
        ("s", 8, 384, 12, 6),
        ("b", 8, 768, 12, 12),
        ("xl", 8, 1152, 28, 16),
        ("g", 16, 1408, 40, 16),
    )
)
M3VIT = {
    "m3vit_s16_e16": _preset(
        "M3ViT on DeiT-S/16, 4 of 16 experts in every second block (Liang et "
        "al., 2022). Needs `tasks`.",
        _SIZES["s"],
        16,
        num_experts=16,
        top_k=4,
    ),
}
