"""Blocks of convolutional networks, written as short strings."""

import re
from typing import NamedTuple

_OPTIONS = {
    "r": ("repeats", int),
    "k": ("kernel_size", int),
    "s": ("strides", int),
    "e": ("expansion", float),
    "c": ("filters", int),
    "se": ("squeeze_ratio", float),
    "cc": ("num_experts", int),
}
_NEEDED = ("repeats", "kernel_size", "strides", "filters")


class BlockSpec(NamedTuple):
    """Some blocks in a row; only the first has the strides."""

    filters: int
    kernel_size: int
    strides: int
    repeats: int
    expansion: float | None
    squeeze_ratio: float
    num_experts: int | None


def as_block_specs(stages):
    """A list of `BlockSpec`, from strings or lists of strings.

    A string is the kind of the blocks, `"ir"` (inverted residual) or `"ds"`
    (depthwise separable, without expansion), and options with their values:
    `"ir_r2_k3_s2_e6_c24_se0.25_cc4"` are 2 blocks with a kernel of 3, strides
    of 2, an expansion of 6, 24 channels, squeeze and excitation by a quarter,
    and 4 experts.

    Raises:
        ValueError: If a string says something else.
    """
    specs = []
    several = stages if isinstance(stages, (list, tuple)) else ()
    for stage in several:
        inner = stage if isinstance(stage, (list, tuple)) else [stage]
        specs += [_block_spec(text) for text in inner]
    if not specs:
        raise ValueError(
            "`stages` must be a list of strings such as 'ir_r2_k3_s2_e6_c24', "
            f"or of lists of them. Received: stages={stages!r}"
        )
    return specs


def _block_spec(text):
    kind, *options = text.split("_") if isinstance(text, str) else [None]
    found = {}
    for option in options:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", option)
        name, number = _OPTIONS.get(match[1] if match else "", (None, None))
        if name is None or name in found:
            _refuse(text, f"{option!r} is not known, or there twice")
        if number is int and not match[2].isdigit():
            _refuse(text, f"{option!r} must be an int")
        found[name] = number(match[2])
        if not found[name] and name != "squeeze_ratio":
            _refuse(text, f"{option!r} must be positive")
    if kind not in ("ir", "ds"):
        _refuse(text, "it must begin with 'ir' or 'ds'")
    for name in (*_NEEDED, *(["expansion"] if kind == "ir" else [])):
        if name not in found:
            _refuse(text, f"there is no {name}")
    if kind == "ds":
        if found.get("expansion", 1) != 1:
            _refuse(text, "'ds' has no expansion")
        found["expansion"] = None
    return BlockSpec(**{"squeeze_ratio": 0.0, "num_experts": None, **found})


def _refuse(text, reason):
    raise ValueError(
        "`stages` must be strings such as 'ir_r2_k3_s2_e6_c24_se0.25_cc4'. "
        f"Received: {text!r}, where {reason}"
    )
