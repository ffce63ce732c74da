from typing import Any
from typing import NamedTuple

import numpy as np

from keras_moe.checks import check_int

# Moves of one search that are looked at together: a bound on its memory.
MAX_DEVICES_LOOKED_AT = 32
# Random changes that are tried, unless the largest load is this close to the
# mean.
CHANGES = 128
GOOD_ENOUGH = 1.002


class Placement(NamedTuple):
    """Which experts each device keeps.

    Fields, of `place_experts`, with a first axis of layers if the loads had one:
        placement: `(num_devices, slots_per_device)` int. The experts of each
            device in ascending order.
        copies: `(E,)` int. How many devices keep each expert.
        device_loads: `(num_devices,)`. Load of each device, if the copies of an
            expert share its load equally.
        imbalance: float. The largest of them over their mean, 1 at balance.
    """

    placement: Any
    copies: Any
    device_loads: Any
    imbalance: Any


def place_experts(
    loads,
    num_devices,
    slots_per_device=None,
    num_nodes=1,
    num_expert_groups=None,
):
    """Decides from measured loads which device keeps and copies which experts.

    Every expert is kept at least once. The slots that are left are given to
    copies of the experts with the largest load per copy, as in DeepSeek's EPLB,
    and the copies are packed onto the devices, the same number on each, so that
    the largest load of a device is small. Exchanges between devices and other
    choices of copies then improve the packing. The result is never worse than
    the experts in their order. The copies of an expert are on different
    devices.

    The problem is NP-hard, and the result not always the best. Of 300 random
    cases small enough to try everything, it was the best in 290; the largest
    load of the others was 2 % above the best on average and 10 % at most.

    With `num_nodes`, all copies of an expert, and all experts of a group, are
    on devices of the same node, for routers that choose groups of experts
    (`num_expert_groups` of `TopKRouter`).

    Args:
        loads: `(E,)` or `(layers, E)`, not negative. Tokens of each expert, or
            shares of them. Each layer is placed on its own.
        num_devices: int.
        slots_per_device: int. Experts that a device has memory for. Defaults
            to the smallest number with which all have a place.
        num_nodes: int. The first `num_devices / num_nodes` devices are the
            first node, and so on. Defaults to `1`.
        num_expert_groups: int. Groups of equal size, of consecutive experts,
            that must not be divided between nodes. Defaults to one for each
            expert.

    Returns:
        A `Placement` of NumPy arrays.

    Raises:
        ValueError: If the loads are not such numbers, or the experts do not fit
            or cannot be divided like this.

    Example:

    Expert 0 does half of the work and gets the slots that are left:

    >>> loads = np.array([60, 20, 20, 20])
    >>> result = keras_moe.distribution.place_experts(loads, 3, 2)
    >>> result.copies.tolist(), result.device_loads.tolist()
    ([3, 1, 1, 1], [40.0, 40.0, 40.0])
    >>> result.placement.tolist()
    [[0, 1], [0, 2], [0, 3]]

    Reference:

    - [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 3.4.1, and
      their EPLB
    - [Graham, 1969](https://doi.org/10.1137/0117039) (largest first)
    """
    loads = _as_loads(loads)
    num_experts = loads.shape[-1]
    check_int("num_devices", num_devices, 1)
    if slots_per_device is None:
        slots_per_device = -(-num_experts // num_devices)
    check_int("slots_per_device", slots_per_device, 1)
    _check_slots(num_experts, num_devices, slots_per_device)
    num_groups = _as_groups(
        num_experts, num_devices, slots_per_device, num_nodes, num_expert_groups
    )
    layers = loads.reshape((-1, num_experts))
    held = np.stack(
        [
            _place_on_nodes(
                layer, num_devices, slots_per_device, num_nodes, num_groups
            )
            for layer in layers
        ]
    )
    copies = np.stack(
        [np.bincount(one.ravel(), minlength=num_experts) for one in held]
    )
    device_loads = np.stack(
        [
            _device_loads(one, layer)
            for one, layer in zip(held, layers, strict=True)
        ]
    )
    imbalance = np.array([_imbalance(one) for one in device_loads])
    if loads.ndim == 1:
        return Placement(held[0], copies[0], device_loads[0], imbalance.item())
    return Placement(held, copies, device_loads, imbalance)


def _as_loads(loads):
    try:
        array = np.asarray(loads, "float64")
    except (TypeError, ValueError):
        array = np.zeros(())
    if (
        array.ndim not in (1, 2)
        or not array.size
        or not np.isfinite(array).all()
        or array.min() < 0
    ):
        raise ValueError(
            "`loads` must be finite numbers of at least 0 and of shape (E,) or "
            f"(layers, E). Received: loads={loads!r}"
        )
    return array


def _check_slots(num_experts, num_devices, slots):
    received = (
        f"Received: slots_per_device={slots}, num_devices={num_devices}, "
        f"{num_experts} experts"
    )
    if num_devices * slots < num_experts:
        raise ValueError(
            "`slots_per_device` times `num_devices` must be at least the "
            f"number of experts. {-(-num_experts // num_devices)} slots on "
            f"each device are enough. {received}"
        )
    if slots > num_experts:
        raise ValueError(
            "`slots_per_device` must be at most the number of experts. "
            f"{received}"
        )


def _as_groups(num_experts, num_devices, slots, num_nodes, num_groups):
    check_int("num_nodes", num_nodes, 1)
    given = num_groups
    if num_groups is None:
        num_groups = num_experts
    check_int("num_expert_groups", num_groups, 1)
    for name, value, divisor in (
        ("num_devices", num_devices, num_nodes),
        ("num_expert_groups", num_groups, num_nodes),
    ):
        if value % divisor:
            raise ValueError(
                f"`{name}` must be a multiple of `num_nodes`. Received: "
                f"{name}={value}, num_nodes={divisor}"
            )
    if num_experts % num_groups:
        raise ValueError(
            "`num_expert_groups` must divide the number of experts. Received: "
            f"num_expert_groups={given}, {num_experts} experts"
        )
    of_node = num_experts // num_nodes
    if slots > of_node:
        raise ValueError(
            "`slots_per_device` must be at most the number of experts of a "
            f"node. Received: slots_per_device={slots}, num_nodes={num_nodes}, "
            f"{num_experts} experts"
        )
    return num_groups


def _place_on_nodes(loads, num_devices, slots, num_nodes, num_groups):
    if num_nodes == 1:
        return _place(loads, num_devices, slots)
    groups = np.arange(loads.size).reshape((num_groups, -1))
    nodes = _place(
        loads[groups].sum(axis=1), num_nodes, num_groups // num_nodes
    )
    held = []
    for of_node in nodes:
        experts = groups[of_node].ravel()
        inner = _place(loads[experts], num_devices // num_nodes, slots)
        held.append(np.sort(experts[inner], axis=1))
    return np.concatenate(held)


def _place(loads, num_devices, slots):
    """`(num_devices, slots)`: the best of three beginnings, improved."""
    experts = _copied(loads, num_devices, num_devices * slots)
    trivial = np.arange(num_devices * slots) % loads.size
    begun = [
        trivial.reshape((num_devices, slots)),
        # The copies of an expert follow each other, and so get different
        # devices.
        experts.reshape((slots, num_devices)).T,
        _largest_first(loads, experts, num_devices, slots),
    ]
    found = [
        _improved(held, loads)
        for held in begun
        if (np.diff(np.sort(held, axis=1), axis=1) > 0).all()
    ]
    best = min(found, key=lambda held: _device_loads(held, loads).max())
    return np.sort(_searched(best, loads), axis=1)


def _searched(held, loads):
    """The best that is found after random changes, from the same seed."""
    rng = np.random.default_rng(0)
    best = _device_loads(held, loads).max()
    good = loads.sum() / len(held) * GOOD_ENOUGH
    for _ in range(CHANGES if held.size > 1 else 0):
        if best <= good:
            break
        changed = _improved(_changed(held, rng), loads)
        largest = _device_loads(changed, loads).max()
        if largest <= best:
            best, held = largest, changed
    return held


def _changed(held, rng):
    """With up to three random moves that keep every expert, once on a device."""
    held = held.copy()
    for _ in range(3):
        device, other = rng.integers(len(held), size=2)
        slot, place = rng.integers(held.shape[1], size=2)
        old, new = held[device, slot], held[other, place]
        if new in held[device]:
            continue
        if (held == old).sum() > 1 and rng.integers(2):
            held[device, slot] = new
        elif old not in held[other]:
            held[device, slot], held[other, place] = new, old
    return held


def _copied(loads, num_devices, num_slots):
    """The expert of each slot, by falling load per copy."""
    copies = np.ones(loads.size, "int64")
    for _ in range(num_slots - loads.size):
        share = np.where(copies < num_devices, loads / copies, -1)
        copies[np.argmax(share)] += 1
    order = np.argsort(-loads / copies, kind="stable")
    return np.repeat(order, copies[order])


def _largest_first(loads, experts, num_devices, slots):
    """Each copy goes to the device with the smallest load that has room."""
    copies = np.bincount(experts, minlength=loads.size)
    held = np.full((num_devices, slots), -1)
    used = np.zeros(num_devices, "int64")
    total = np.zeros(num_devices)
    for expert in experts:
        has_it = (held == expert).any(axis=1)
        cost = np.where(used < slots, total, np.inf)
        device = np.argmin(np.where(has_it, np.inf, cost))
        if has_it[device] or used[device] == slots:
            device = np.argmin(cost)
        held[device, used[device]] = expert
        used[device] += 1
        total[device] += loads[expert] / copies[expert]
    return held


def _improved(held, loads):
    """Moves that lower the largest load, until there is none."""
    held = held.copy()
    for _ in range(8 * held.size):
        if not _exchange(held, loads) and not _copy_another(held, loads):
            break
    return held


def _exchange(held, loads):
    """Swaps a copy of the busiest device, if that helps; says whether."""
    share = loads / np.bincount(held.ravel(), minlength=loads.size)
    total = share[held].sum(axis=1)
    busiest = np.argmax(total)
    mine = held[busiest]
    # (slots of the busiest, devices, slots)
    moved = share[mine][:, None, None] - share[held][None]
    result = np.maximum(total[busiest] - moved, total[None, :, None] + moved)
    has_mine = (held[None] == mine[:, None, None]).any(axis=-1)
    has_theirs = (held[:, :, None] == mine).any(axis=-1)
    result[has_mine] = np.inf
    result[:, has_theirs] = np.inf
    slot, device, other = np.unravel_index(np.argmin(result), result.shape)
    if not result[slot, device, other] < total[busiest] * (1 - 1e-9):
        return False
    held[busiest, slot], held[device, other] = held[device, other], mine[slot]
    return True


def _copy_another(held, loads):
    """Copies one of the busiest device's experts in the place of a copy."""
    copies = np.bincount(held.ravel(), minlength=loads.size)
    share = loads / copies
    total = share[held].sum(axis=1)
    busiest = np.argmax(total)
    wanted = held[busiest]
    wanted = wanted[copies[wanted] < len(held)]
    idle = np.argsort(total, kind="stable")[:MAX_DEVICES_LOOKED_AT]
    has = np.zeros((loads.size, len(held)), bool)
    has[held.ravel(), np.repeat(np.arange(len(held)), held.shape[1])] = True
    best, move = total[busiest] * (1 - 1e-9), None
    for device in idle:
        for slot, old in enumerate(held[device]):
            new = wanted[~has[wanted, device] & (wanted != old)]
            if copies[old] == 1 or not new.size:
                continue
            old_share = loads[old] / (copies[old] - 1)
            new_share = loads[new] / (copies[new] + 1)
            after = total + has[old] * (old_share - share[old])
            after = after + has[new] * (new_share - share[new])[:, None]
            after[:, device] += new_share - old_share
            largest = after.max(axis=1)
            if largest.min() < best:
                best = largest.min()
                move = device, slot, new[np.argmin(largest)]
    if move is None:
        return False
    held[move[:2]] = move[2]
    return True


def _device_loads(held, loads):
    share = loads / np.bincount(held.ravel(), minlength=loads.size)
    return share[held].sum(axis=1)


def _imbalance(device_loads):
    mean = device_loads.mean()
    return device_loads.max() / mean if mean > 0 else 1.0
