"""Published dense configurations, whose blocks may get experts.

`from_preset("convnext_tiny", moe_layers="last_2")` gives some of them experts.
"""


def _convnext(name, hidden_dim, depth):
    depths = (3, 3, depth, 3)
    return f"convnext_{name}", {
        "description": f"ConvNeXt-{name}, dense; `moe_layers` says which "
        "blocks get experts (Liu et al., 2022).",
        "config": {
            "image_shape": (224, 224, 3),
            "data_format": "channels_last",
            "depths": depths,
            "hidden_dims": tuple(hidden_dim * 2**i for i in range(4)),
            "moe_layers": (),
        },
    }


# hidden_dim, token_mlp_dim, mlp_dim, num_layers.
_MIXER_SIZES = {
    "s": (512, 256, 2048, 8),
    "b": (768, 384, 3072, 12),
    "l": (1024, 512, 4096, 24),
    "h": (1280, 640, 5120, 32),
}


def _mixer(size, patch):
    hidden_dim, token_mlp_dim, mlp_dim, num_layers = _MIXER_SIZES[size]
    return f"mixer_{size}{patch}", {
        "description": f"MLP-Mixer-{size.upper()}/{patch}, dense; `moe_layers` "
        "and `token_moe_layers` say which blocks get experts (Tolstikhin et "
        "al., 2021).",
        "config": {
            "image_shape": (224, 224, 3),
            "data_format": "channels_last",
            "patch_size": patch,
            "num_layers": num_layers,
            "hidden_dim": hidden_dim,
            "token_mlp_dim": token_mlp_dim,
            "mlp_dim": mlp_dim,
            "moe_layers": (),
        },
    }


CONVNEXT = dict(
    _convnext(*arguments)
    for arguments in (
        ("tiny", 96, 9),
        ("small", 96, 27),
        ("base", 128, 27),
        ("large", 192, 27),
        ("xlarge", 256, 27),
    )
)
MIXER = dict(
    _mixer(*arguments)
    for arguments in (
        ("s", 32),
        ("s", 16),
        ("b", 32),
        ("b", 16),
        ("l", 32),
        ("l", 16),
        ("h", 14),
    )
)
