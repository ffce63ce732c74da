import keras
import numpy as np
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_text
from keras_moe.recommendation.features.categorical import MISSING
from keras_moe.recommendation.features.categorical import Categorical
from keras_moe.recommendation.features.categorical import Counts
from keras_moe.recommendation.features.columns import missing as missing_values
from keras_moe.recommendation.features.columns import to_numpy

COMBINERS = ("mean", "sum", "sqrtn", "max")


@keras.saving.register_keras_serializable("keras_moe")
class MultiCategorical(Categorical):
    """A feature with several values: genres of a film, words of a title.

    The model takes ids as `Categorical` does, in lists padded to one length.
    The vector is the mean (or another `combiner`) of the entries' vectors,
    without padding (`mask_id` and `-1`). An empty list gives zeros. Unknown
    entries count like any other.

    `encode` takes lists of values, strings with a `separator`, or arrays
    `(N, length)` of values. It pads short lists and cuts long ones.

    Args:
        name: str. Name of the feature.
        vocabulary: As in `Categorical`. Defaults to `None`.
        num_ids: As in `Categorical`. Defaults to `None`.
        embedding_dim: As in `Categorical`. Defaults to `None`.
        table: As in `Categorical`. Defaults to `None`.
        length: int. Length of the lists. Defaults to `None`: the length of the
            longest list in `adapt`, or any length without `adapt`.
        combiner: `"mean"`, `"sum"`, `"sqrtn"` (the sum divided by the square
            root of the number of entries) or `"max"`. Defaults to `"mean"`.
        mask_id: int. Id of padding: `-1`, or `0` for data padded with zeros, in
            which no value has the id 0. Defaults to `-1`.
        separator: str. Separator of the values in strings, as in
            `"drama|comedy"`. Defaults to `None`: the values are in lists.
        max_vocabulary: As in `Categorical`. Defaults to `None`.
        min_count: As in `Categorical`. Defaults to `1`.
        num_hash_buckets: As in `Categorical`. Defaults to `None`.

    Raises:
        ValueError: If an argument is out of range or of the wrong kind, or
            arguments do not fit together.

    Example:

    >>> genres = keras_moe.layers.MultiCategorical(
    ...     "genres", ["drama", "comedy", "war"], length=3, separator="|")
    >>> layer = keras_moe.layers.FeatureEmbedding([genres])
    >>> layer.encode({"genres": ["war|drama", "art"]})["genres"].tolist()
    [[2, 0, -1], [-2, -1, -1]]
    """

    # Whether a list that is too long keeps its end, or its beginning.
    keeps_last = False

    def __init__(
        self,
        name,
        vocabulary=None,
        num_ids=None,
        embedding_dim=None,
        table=None,
        length=None,
        combiner="mean",
        mask_id=MISSING,
        separator=None,
        max_vocabulary=None,
        min_count=1,
        num_hash_buckets=None,
    ):
        super().__init__(
            name,
            vocabulary,
            num_ids,
            embedding_dim,
            table,
            max_vocabulary,
            min_count,
            num_hash_buckets,
        )
        if length is not None:
            check_int("length", length, 1)
        if separator is not None:
            check_text("separator", separator)
        self.check_combiner(combiner)
        check_one_of("mask_id", mask_id, (MISSING, 0))
        if mask_id == 0 and num_ids is None:
            raise ValueError(
                "With `mask_id=0` no value may have the id 0, but the first "
                "of a vocabulary has it, and a hashed one may. Received, for "
                f"feature {name!r}: mask_id=0, num_ids=None"
            )
        self.length = length
        self.combiner = combiner
        self.mask_id = mask_id
        self.separator = separator

    def check_combiner(self, combiner):
        check_one_of("combiner", combiner, COMBINERS)

    @property
    def input_shape(self):
        return (self.length,)

    def statistics(self):
        if self.num_ids is not None and self.length is not None:
            return None
        return _ListCounts(self)

    def adapt(self, statistics):
        if self.num_ids is None:
            super().adapt(statistics)
        if self.length is None:
            self.length = max(statistics.length, 1)

    def encode(self, values, missing):
        lists = self.lists(values, missing)
        length = self.length or max([len(v) for v in lists], default=1) or 1
        ids = np.full((len(lists), length), self.mask_id, "int32")
        for i, entries in enumerate(lists):
            if not len(entries):
                continue
            known = ~missing_values(entries)
            row = np.full(len(entries), MISSING, "int32")
            row[known] = self.ids_of(entries[known])
            if len(row) > length:  # Drop padding first.
                row = row[(row != MISSING) & (row != self.mask_id)]
                row = row[-length:] if self.keeps_last else row[:length]
            ids[i, : len(row)] = row
        return ids

    def lists(self, values, missing):
        """One array of values for each example."""
        if values.ndim == 2:
            return list(values)
        empty = np.empty(0, object)
        return [
            empty if absent else self._entries(value)
            for value, absent in zip(values, missing, strict=True)
        ]

    def _entries(self, value):
        if isinstance(value, (str, bytes)):
            if self.separator is None:
                raise ValueError(
                    f"Feature {self.name!r} must be made of lists; strings "
                    f"need a `separator`. Received: {value!r}"
                )
            text = value.decode() if isinstance(value, bytes) else value
            value = [v for v in text.split(self.separator) if v]
        elif not isinstance(value, (list, tuple, np.ndarray)):
            raise ValueError(
                f"Feature {self.name!r} must be made of lists. "
                f"Received: {value!r}"
            )
        return to_numpy(value) if len(value) else np.empty(0, object)

    def embed(self, inputs, table=None):
        mask = ops.logical_and(inputs != self.mask_id, inputs != MISSING)
        return combine(table(self.rows(inputs)), mask, self.combiner)

    def get_config(self):
        return {
            **super().get_config(),
            "length": self.length,
            "combiner": self.combiner,
            "mask_id": self.mask_id,
            "separator": self.separator,
        }


def combine(vectors, mask, combiner):
    """Combines vectors `(B, L, D)` where the mask is true into `(B, D)`."""
    mask = ops.expand_dims(mask, -1)  # (B, L, 1)
    if combiner == "max":
        # No infinities: a row of padding alone must give zeros.
        lowest = ops.min(vectors, axis=1, keepdims=True)
        best = ops.max(ops.where(mask, vectors, lowest), axis=1)
        return ops.where(ops.any(mask, axis=1), best, ops.zeros_like(best))
    mask = ops.cast(mask, vectors.dtype)
    total = ops.sum(ops.where(mask > 0, vectors, 0.0), axis=1)  # (B, D)
    count = ops.maximum(ops.sum(mask, axis=1), 1.0)
    if combiner == "mean":
        return total / count
    return total / ops.sqrt(count) if combiner == "sqrtn" else total


class _ListCounts(Counts):
    """How often each value occurs, and how long the longest list is."""

    def __init__(self, feature):
        super().__init__()
        self.feature = feature
        self.length = 0

    def update(self, values, missing):
        for entries in self.feature.lists(values, missing):
            self.length = max(self.length, len(entries))
            if self.feature.num_ids is None:
                super().update(entries, missing_values(entries))
