"""Published configurations; no weights come with them."""

# kind, repeats, kernel size, strides, expansion and channels of each stage.
_STAGES = (
    ("ds", 1, 3, 1, 1, 16),
    ("ir", 2, 3, 2, 6, 24),
    ("ir", 2, 5, 2, 6, 40),
    ("ir", 3, 3, 2, 6, 80),
    ("ir", 3, 5, 1, 6, 112),
    ("ir", 4, 5, 2, 6, 192),
    ("ir", 1, 3, 1, 6, 320),
)


def _stages(num_experts, more=0):
    """The last three stages have experts; `more` blocks are in each."""
    return [
        f"{kind}_r{r + more}_k{k}_s{s}_e{e}_c{c}_se0.25"
        + (f"_cc{num_experts}" if number >= 4 else "")
        for number, (kind, r, k, s, e, c) in enumerate(_STAGES)
    ]


def _cond_conv(size, num_experts, image_size, drop_path):
    return f"efficientnet_cc_{size}_e{num_experts}", {
        "description": f"CondConv-EfficientNet-{size.upper()}, {num_experts} "
        "kernels in the last three stages (Yang et al., 2019).",
        "config": {
            "image_shape": (image_size, image_size, 3),
            "data_format": "channels_last",
            "stages": _stages(num_experts, int(size == "b1")),
            "drop_path": drop_path,
        },
    }


EFFICIENTNET_B0 = tuple(_stages(4))
COND_CONV = dict(
    _cond_conv(*arguments)
    for arguments in (
        ("b0", 4, 224, 0.2),
        ("b0", 8, 224, 0.2),
        ("b1", 8, 240, 0.2),
    )
)
