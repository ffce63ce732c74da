"""Which blocks of an encoder have experts, and what each of them has."""

import re

import keras

from keras_moe.checks import is_int
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.stacked.draws import unshared


def moe_block_indices(moe_layers, num_layers, candidates, name="moe_layers"):
    """The blocks with experts, counted from 0, in order.

    Args:
        moe_layers: `"every_2"`, `"last_n"` (the last n of `candidates`), or a
            list of ints.
        num_layers: int. Blocks of the encoder.
        candidates: list of ints. The blocks that `"last_n"` counts.
        name: str. Of the argument, for errors. Defaults to `"moe_layers"`.

    Raises:
        ValueError: If it is of another kind, or beyond the encoder.
    """
    if isinstance(moe_layers, str):
        last = re.fullmatch(r"last_(\d+)", moe_layers)
        if moe_layers == "every_2":
            return list(range(1, num_layers, 2))
        if last and 1 <= int(last[1]) <= len(candidates):
            return candidates[-int(last[1]) :]
    elif isinstance(moe_layers, (list, tuple)) and all(
        is_int(i) and 0 <= i < num_layers for i in moe_layers
    ):
        if len(set(moe_layers)) == len(moe_layers):
            return sorted(moe_layers)
    raise ValueError(
        f"`{name}` must be 'every_2', 'last_n' with n from 1 to "
        f"{len(candidates)}, or a list of different ints from 0 to "
        f"`num_layers - 1`. Received: {name}={moe_layers!r}, "
        f"num_layers={num_layers}"
    )


def per_block(name, value, number):
    """One value for each block with experts, from one for all or a list."""
    if not isinstance(value, (list, tuple)):
        return [value] * number
    if len(value) != number:
        raise ValueError(
            f"A list as `{name}` must have an entry for each of the {number} "
            f"blocks with experts. Received: {name}={value!r}"
        )
    return list(value)


def odd_in_stages(depths):
    """The odd blocks of each stage, as numbers of the whole network.

    Args:
        depths: list of ints. Blocks of each stage.

    Returns:
        A list of lists.
    """
    first = 0
    found = []
    for depth in depths:
        found.append(list(range(first + 1, first + depth, 2)))
        first += depth
    return found


def own_copy(part):
    """What a block makes a part of its own of: the config of a layer."""
    if isinstance(part, keras.layers.Layer):
        return unshared(serialize_part(part))
    return part
