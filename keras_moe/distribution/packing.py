"""Packs copies of experts onto devices: greedy, then a local search.

`held` is `(num_devices, slots)`, the experts of each device.
"""

import numpy as np

# Moves of one search that are looked at together: a bound on its memory.
MAX_DEVICES_LOOKED_AT = 32
# Random changes that are tried, unless the largest load is this close to the
# mean.
CHANGES = 128
GOOD_ENOUGH = 1.002


def place(loads, num_devices, slots):
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
    best = min(found, key=lambda held: device_loads(held, loads).max())
    return np.sort(_searched(best, loads), axis=1)


def _searched(held, loads):
    """The best that is found after random changes, from the same seed."""
    rng = np.random.default_rng(0)
    best = device_loads(held, loads).max()
    good = loads.sum() / len(held) * GOOD_ENOUGH
    for _ in range(CHANGES if held.size > 1 else 0):
        if best <= good:
            break
        changed = _improved(_changed(held, rng), loads)
        largest = device_loads(changed, loads).max()
        if largest <= best:
            best, held = largest, changed
    return held


def _changed(held, rng):
    """After up to three random moves."""
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


def device_loads(held, loads):
    share = loads / np.bincount(held.ravel(), minlength=loads.size)
    return share[held].sum(axis=1)
