"""Which experts are computed together, and where their rows lie meanwhile."""

from typing import NamedTuple

import numpy as np
import torch

# So many rows are computed at full speed, and stay in the cache.
_MOST_ROWS = 384


class Batch(NamedTuple):
    """Experts that share one batched product, as if all had as many rows.

    Fields:
        experts: slice of the experts.
        places: slice of the places of their rows.
        shape: `(number of experts, places of each)`.
    """

    experts: slice
    places: slice
    shape: tuple

    def stack(self, rows):
        """`(places, F) -> (experts, places of each, F)`."""
        return rows.reshape(*self.shape, rows.shape[-1])

    def pick(self, bank):
        """The part of a weight for these experts; `None` stays `None`."""
        return None if bank is None else bank[self.experts]


class Layout(NamedTuple):
    """Where the rows lie: the rows of each expert, then any free places.

    Fields:
        batches: list of `Batch`.
        idle: list of the experts without a row.
        most_places: int. Places of the largest batch.
        place_of_row: `(n,)`, for the `n` rows that belong to an expert.
        row_of_place: `(places,)`. A free place has the first row of its
            expert, so that no NaN reaches an expert that had not seen it.
        taken: `(places,)` float32. 1, and 0 for free places.
        token_of_place: `(places,)`.
        places_of_token: `(T, K)`. The number of places if no row is for the
            choice.
    """

    batches: list
    idle: list
    most_places: int
    place_of_row: torch.Tensor
    row_of_place: torch.Tensor
    taken: torch.Tensor
    token_of_place: torch.Tensor
    places_of_token: torch.Tensor

    def to_places(self, row_weights, dtype):
        """`(N,) -> (places, 1)`, zero at free places."""
        weights = torch.index_select(row_weights, 0, self.row_of_place)
        return (weights * self.taken).to(dtype)[:, None]

    def to_rows(self, by_place, row_weights):
        """`(places,) -> (N,)`, zero for unused rows."""
        out = torch.zeros_like(row_weights)
        used = torch.index_select(by_place, 0, self.place_of_row)
        out[: len(used)] = used
        return out

    def sum_by_token(self, rows):
        """`(places + 1, D) -> (T, D)`, added up in float32 at least."""
        if not self.places_of_token.numel():
            return rows.new_zeros(len(self.places_of_token), rows.shape[1])
        rows[-1] = 0  # for choices without a row
        return torch.nn.functional.embedding_bag(
            self.places_of_token, rows, mode="sum"
        )


def lay_out(choices, group_sizes, num_tokens):
    # In NumPy, which takes a third of the time for arrays as small as these.
    choices, sizes = choices.numpy(), group_sizes.numpy()
    busy = np.flatnonzero(sizes)
    batches, rooms = _batches(busy.tolist(), sizes[busy].tolist())
    sizes, rooms = sizes[busy], np.array(rooms, "int32")  # (busy experts,)
    num_rows, num_places = int(sizes.sum()), int(rooms.sum())
    first_rows = np.cumsum(sizes) - sizes
    first_places = np.cumsum(rooms) - rooms
    rows = np.arange(num_rows, dtype="int32")
    place_of_row = rows + np.repeat(first_places - first_rows, sizes)
    row_of_place = np.repeat(first_rows, rooms)
    row_of_place[place_of_row] = rows
    taken = np.zeros(num_places, "float32")
    taken[place_of_row] = 1
    places_of_token = np.full(len(choices), num_places, "int32")
    places_of_token[choices[:num_rows]] = place_of_row
    top_k = len(choices) // max(num_tokens, 1)
    places_of_token = places_of_token.reshape(top_k, num_tokens).T
    return Layout(
        batches,
        np.flatnonzero(group_sizes.numpy() == 0).tolist(),
        max((b.places.stop - b.places.start for b in batches), default=0),
        *map(
            torch.from_numpy,
            (
                place_of_row,
                row_of_place,
                taken,
                choices[row_of_place] % max(num_tokens, 1),
                np.ascontiguousarray(places_of_token),
            ),
        ),
    )


def _batches(experts, sizes):
    """The batches, and the places of each expert."""
    batches, rooms, first, place = [], [], 0, 0
    while first < len(experts):
        count = _count(experts[first:], sizes[first:])
        ours, room = experts[first : first + count], max(sizes[first:][:count])
        step = ours[1] - ours[0] if count > 1 else 1
        batches.append(
            Batch(
                slice(ours[0], ours[-1] + 1, step),
                slice(place, place + count * room),
                (count, room),
            )
        )
        rooms += [room] * count
        first, place = first + count, place + count * room
    return batches, rooms


def _count(experts, sizes):
    """How many of the experts the first batch takes.

    They are at equal distances, as a slice can name them, and leave hardly more
    than an eighth of their places free. Their number is a power of two, as that
    of processors is: on two of them, three take as long as four.
    """
    count, rows, room = 1, sizes[0], sizes[0]
    for expert, size in zip(experts[1:], sizes[1:], strict=True):
        rows, room = rows + size, max(room, size)
        places = (count + 1) * room
        if (
            expert != experts[0] + count * (experts[1] - experts[0])
            or places > _MOST_ROWS
            or places > rows * 1.125 + 16
        ):
            break
        count += 1
    return 1 << (count.bit_length() - 1)
