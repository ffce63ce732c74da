"""Published configurations; no weights come with them."""

_SIZES = {"s": (96, (3, 6, 12, 24), 0.2), "b": (128, (4, 8, 16, 32), 0.3)}


def _swin_moe(size, num_experts, router="v_moe", top_k=1):
    hidden_dim, num_heads, drop_path = _SIZES[size]
    kind = "_cosine" if router != "v_moe" else "_top2" * (top_k == 2)
    experts = f"e{num_experts}{kind}" if num_experts else "dense"
    what = f"{top_k} of {num_experts} experts" if num_experts else "no experts"
    if kind == "_cosine":
        what += " by cosines"
    config = {
        "image_shape": (192, 192, 3),
        "data_format": "channels_last",
        "hidden_dim": hidden_dim,
        "depths": (2, 2, 18, 2),
        "num_heads": num_heads,
        "window_size": 12,
        "num_experts": num_experts or 1,
        "moe_layers": None if num_experts else (),
        "router": router,
        "top_k": top_k,
        "expert_dropout": 0.1,
        "drop_path": drop_path,
        "use_output_bias": False,
    }
    return f"swin_moe_{size}_{experts}", {
        "description": f"Swin-MoE-{size.upper()}, window 12 on 192 pixels, "
        f"{what} in a block (Hwang et al., 2022).",
        "config": config,
    }


SWIN_MOE = dict(
    _swin_moe(*arguments)
    for arguments in (
        ("s", 0),
        ("s", 8),
        ("s", 16),
        ("s", 32),
        ("s", 32, "swin_moe_cosine"),
        ("s", 64),
        ("s", 128),
        ("b", 0),
        ("b", 8),
        ("b", 16),
        ("b", 32),
        ("b", 32, "swin_moe_cosine"),
        ("b", 32, "v_moe", 2),
    )
)
