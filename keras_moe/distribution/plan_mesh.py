"""Meshes of a plan, what they divide, and how evenly."""

import math

import keras
import numpy as np

from keras_moe.checks import check_int
from keras_moe.checks import nearest_divisors

AXES = ("data", "expert", "model")


def as_mesh(mesh):
    """`{"data": ..., "expert": ..., "model": ...}`, with 1 for what lacks."""
    if isinstance(mesh, keras.distribution.DeviceMesh):
        mesh = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    if not isinstance(mesh, dict) or not set(mesh) <= set(AXES):
        raise ValueError(
            "`mesh` must be a dict with sizes of the axes "
            f"{AXES}, or a keras.distribution.DeviceMesh with these. "
            f"Received: mesh={mesh!r}"
        )
    for axis, size in mesh.items():
        check_int(f"mesh[{axis!r}]", size, 1)
    return {axis: mesh.get(axis, 1) for axis in AXES}


def check_divisions(mesh, batch, layers):
    """Raises if the batch or a layer cannot be divided by the mesh."""
    for layer in layers:
        for axis, what, size in (
            ("expert", "number of experts", layer.num_experts),
            ("model", "hidden width of the experts", layer.width),
        ):
            if layer.divided and size is not None and size % mesh[axis]:
                raise ValueError(
                    f"mesh[{axis!r}] must divide the {what} of {layer.name!r}, "
                    f"{size}. The nearest that do are "
                    f"{nearest_divisors(size, mesh[axis])}. "
                    f"Received: mesh={mesh}"
                )
        if layer.divided and layer.width is None and mesh["model"] > 1:
            raise ValueError(
                "mesh['model'] divides only feed-forward experts, which "
                f"{layer.name!r} has not. Received: mesh={mesh}"
            )
    check_int("batch", batch, 1)
    devices = mesh["data"] * mesh["expert"]
    if batch % devices:
        below = batch // devices * devices
        nearest = f"{below} and " if below else ""
        raise ValueError(
            "`batch` must be a multiple of the devices that share it, "
            f"mesh['data'] * mesh['expert'] = {devices}. The nearest are "
            f"{nearest}{below + devices}. Received: batch={batch}, mesh={mesh}"
        )


def expected_imbalance(layer, mesh, tokens, loads, seed):
    """Largest number of rows of a device over the mean, if chance decides.

    The tokens of the `expert` devices that exchange rows choose experts
    independently, with the frequencies `loads`, and no expert twice. All
    groups of devices wait for the slowest. The mean of draws.
    """
    shards, groups = mesh["expert"], mesh["data"]
    if shards == 1 or not layer.divided:
        return 1.0
    if loads is None:
        shares = np.full(shards, 1 / shards)
    else:
        shares = loads.reshape((shards, -1)).sum(axis=1) / loads.sum()
    rows = max(round(tokens * shards * layer.rows_per_token), 1)
    draws = max(4, min(256, 2**19 // (groups * shards)))
    counts = np.random.default_rng(seed).multinomial(
        rows, shares, size=(draws, groups)
    )
    mean = rows * shares
    # Distinct choices of a token vary less than independent ones.
    left = max(layer.num_experts - layer.rows_per_token, 0)
    spread = math.sqrt(left / max(layer.num_experts - 1, 1))
    busiest = (mean + (counts - mean) * spread).max(axis=(1, 2))
    return float(busiest.mean() * shards / rows)
