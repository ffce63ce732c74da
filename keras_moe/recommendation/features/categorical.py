import keras
import numpy as np
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_ordered
from keras_moe.checks import check_text
from keras_moe.recommendation.features.columns import plain
from keras_moe.recommendation.features.feature import Feature
from keras_moe.recommendation.features.hashing import hashed_ids

# Ids of missing and of unknown values.
MISSING = -1
UNKNOWN = -2


@keras.saving.register_keras_serializable("keras_moe")
class Categorical(Feature):
    """A feature with one of many values: a user, a country, a device type.

    The model takes ids: `0` to `num_ids - 1`, `-1` for a missing value, and
    `-2` for an unknown one. Missing and unknown values have vectors of their
    own: row `0` of the table is for missing values, row `1` for unknown ones,
    and row `i + 2` for the id `i`.

    Any other id also means "unknown" where values are not checked (`tf.data`,
    generators, compiled steps). In NumPy arrays given to `fit`, `evaluate`,
    `predict` or `encode` it is an error. Frameworks truncate ids beyond int32:
    hash large ids first.

    With a `vocabulary`, `encode` turns strings or other values into ids: the
    position in the vocabulary, or `-2` if the value is not in it. This happens
    to the data, in NumPy: no string enters the model.

    With `num_hash_buckets`, `encode` hashes each value to an id and needs no
    list of values. This suits features with very many values, or with values
    not seen yet. No value is unknown then, and some values share an id. A value
    has the same id in every process; `3` and `3.0` are one value, `"3"` is
    another.

    The vectors of missing and unknown values are trained like the others, if
    the training data contain missing and unknown values (`max_vocabulary` and
    `min_count` make rare values unknown). Otherwise they keep their initial
    numbers.

    Args:
        name: str. Name of the feature.
        vocabulary: Sequence of strings or numbers. Defaults to `None`: the data
            hold ids, or `adapt` learns the vocabulary.
        num_ids: int. Number of ids, if there is no vocabulary. Defaults to
            `None`.
        embedding_dim: int. Width of the vectors. Defaults to `None`: the
            `embedding_dim` of the `FeatureEmbedding`.
        table: str. Name of the table of vectors. Features that name the same
            table share it. Defaults to `None`: a table for this feature alone.
        max_vocabulary: int. Maximal size of a learned vocabulary: the most
            frequent values stay. Defaults to `None`: no limit.
        min_count: int. Minimal number of times that a value must occur to
            enter a learned vocabulary. Defaults to `1`.
        num_hash_buckets: int. Number of ids that values are hashed to, instead
            of a vocabulary or `num_ids`. Defaults to `None`: no hashing.

    Raises:
        ValueError: If an argument is out of range or of the wrong kind, or
            arguments do not fit together.

    Example:

    >>> country = keras_moe.layers.Categorical("country", ["fr", "it", "es"])
    >>> layer = keras_moe.layers.FeatureEmbedding([country], embedding_dim=4)
    >>> layer.encode({"country": ["it", None, "at"]})["country"].tolist()
    [1, -1, -2]
    """

    input_dtype = "int32"

    def __init__(
        self,
        name,
        vocabulary=None,
        num_ids=None,
        embedding_dim=None,
        table=None,
        max_vocabulary=None,
        min_count=1,
        num_hash_buckets=None,
    ):
        super().__init__(name)
        if vocabulary is not None and num_ids is not None:
            raise ValueError(
                "`num_ids` must be None where a `vocabulary` tells it. "
                f"Received both, for feature {name!r}: num_ids={num_ids!r}"
            )
        if num_ids is not None:
            check_int("num_ids", num_ids, 1)
        if num_hash_buckets is not None:
            check_int("num_hash_buckets", num_hash_buckets, 1)
            if vocabulary is not None or num_ids is not None:
                raise ValueError(
                    "`num_hash_buckets` takes neither a `vocabulary` nor "
                    f"`num_ids` beside it. Received, for feature {name!r}: "
                    f"num_hash_buckets={num_hash_buckets}, "
                    f"vocabulary={vocabulary!r}, num_ids={num_ids!r}"
                )
        if table is not None:
            check_text("table", table)
        if embedding_dim is not None:
            check_int("embedding_dim", embedding_dim, 1)
        if max_vocabulary is not None:
            check_int("max_vocabulary", max_vocabulary, 1)
        check_int("min_count", min_count, 1)
        self.embedding_dim = embedding_dim
        self.table = table or name
        self.max_vocabulary = max_vocabulary
        self.min_count = min_count
        self.num_hash_buckets = num_hash_buckets
        self._given_num_ids = num_ids
        self.vocabulary = None
        if vocabulary is not None:
            check_ordered("vocabulary", vocabulary)
            self._set_vocabulary(vocabulary)

    def _set_vocabulary(self, vocabulary):
        self.vocabulary = [plain(value) for value in vocabulary]
        for value in self.vocabulary:
            if not isinstance(value, (str, int, float)):
                raise ValueError(
                    f"The values of feature {self.name!r} must be strings or "
                    "numbers, which can be saved. Convert others to strings. "
                    f"Received: {value!r}"
                )
        self._ids = {value: i for i, value in enumerate(self.vocabulary)}
        if not self._ids or len(self._ids) < len(self.vocabulary):
            raise ValueError(
                f"The vocabulary of feature {self.name!r} must have entries, "
                f"and none twice. Received: {len(self.vocabulary)} entries, "
                f"{len(self._ids)} different"
            )

    @property
    def num_ids(self):
        if self.vocabulary is not None:
            return len(self.vocabulary)
        return self.num_hash_buckets or self._given_num_ids

    @property
    def lacks(self):
        return "a `vocabulary` or `num_ids`" if self.num_ids is None else None

    def take_ids_of(self, other):
        """Takes the vocabulary, or the number of ids, of another feature."""
        if other.vocabulary is not None:
            self._set_vocabulary(other.vocabulary)
        self.num_hash_buckets = other.num_hash_buckets
        self._given_num_ids = other._given_num_ids

    def statistics(self):
        return Counts() if self.num_ids is None else None

    def adapt(self, statistics):
        # By frequency; ties by name, independent of the order of the data.
        counts = sorted(
            statistics.counts.items(), key=lambda item: (-item[1], str(item[0]))
        )
        kept = [value for value, count in counts if count >= self.min_count]
        if not kept:
            raise ValueError(
                f"No value of feature {self.name!r} occurs at least "
                f"{self.min_count} times."
            )
        self._set_vocabulary(kept[: self.max_vocabulary])

    def encode(self, values, missing):
        ids = np.full(values.shape, MISSING, "int32")
        known = ~missing
        ids[known] = self.ids_of(values[known])
        return ids

    def ids_of(self, values):
        """The ids of an array of values without missing ones."""
        if self.num_hash_buckets is not None:
            return hashed_ids(values, self.num_hash_buckets)
        if self.vocabulary is not None:
            ids = [self._ids.get(v, UNKNOWN) for v in map(plain, values)]
            if ids and max(ids) == UNKNOWN:
                self._check_kind(values)
            return ids
        try:
            numbers = values.astype("float64")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Feature {self.name!r} has no vocabulary: it must be made of "
                f"ids. Received: dtype={values.dtype}, with {values[0]!r}"
            ) from error
        self._check_ids(numbers)
        return numbers.astype("int32")

    def _check_kind(self, values):
        """Raises if strings meet a vocabulary of numbers, or the reverse."""
        kinds = {isinstance(plain(value), str) for value in values}
        if kinds.isdisjoint(isinstance(v, str) for v in self.vocabulary):
            raise ValueError(
                f"No value of feature {self.name!r} can be in its vocabulary: "
                "one has strings, the other has none. Received: "
                f"{plain(values[0])!r}, vocabulary: {self.vocabulary[0]!r}, ..."
            )

    def check(self, values):
        super().check(values)
        self._check_ids(values)

    def _check_ids(self, values):
        if values.dtype.kind == "f":
            wrong = ~(values == np.floor(values))
        else:
            wrong = np.zeros(values.shape, bool)
        wrong |= (values < UNKNOWN) | (values >= self.num_ids)
        if wrong.any():
            raise ValueError(
                f"The ids of feature {self.name!r} must be whole numbers from "
                f"0 to {self.num_ids - 1}, -1 (missing) or -2 (unknown). "
                f"Received: {values[wrong][:5]}"
            )

    def rows(self, ids):
        """The rows of the table that hold the vectors of ids."""
        return rows_of(ops.cast(ids, "int32"), self.num_ids)

    def embed(self, inputs, table=None):
        return table(self.rows(inputs))

    @property
    def width(self):
        return self.embedding_dim

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary": self.vocabulary,
            "num_ids": self._given_num_ids,
            "embedding_dim": self.embedding_dim,
            "table": self.table,
            "max_vocabulary": self.max_vocabulary,
            "min_count": self.min_count,
            "num_hash_buckets": self.num_hash_buckets,
        }


def rows_of(ids, num_ids):
    """Ids as rows of a table: 0 for missing, 1 for unknown, `id + 2` else."""
    inside = ops.logical_and(ids >= 0, ids < num_ids)
    rows = ops.where(inside, ids + 2, 1)
    # In a graph, `==` may compare the tensor objects, not their values.
    return ops.where(ops.equal(ids, MISSING), 0, rows)


class Counts:
    """How often each value occurs."""

    def __init__(self):
        self.counts = {}

    def share(self, other):
        """From now on, adds to the counts of other statistics."""
        self.counts = other.counts

    def update(self, values, missing):
        for value in map(plain, values[~missing]):
            self.counts[value] = self.counts.get(value, 0) + 1
