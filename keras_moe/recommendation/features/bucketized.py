import keras
import numpy as np
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_number
from keras_moe.checks import check_ordered
from keras_moe.recommendation.features.categorical import MISSING
from keras_moe.recommendation.features.categorical import Categorical
from keras_moe.recommendation.features.columns import as_floats
from keras_moe.recommendation.features.feature import Feature
from keras_moe.recommendation.features.feature import check_finite


@keras.saving.register_keras_serializable("keras_moe")
class Bucketized(Categorical):
    """A number sorted into buckets, each with a vector of its own.

    Bucket `i` is `boundaries[i - 1] <= x < boundaries[i]`. A missing number
    (NaN) has a vector of its own.

    Args:
        name: str. Name of the feature.
        boundaries: Sequence of ascending floats that separate the buckets.
            Defaults to `None`: `adapt` takes quantiles of the data.
        num_buckets: int. Number of buckets that `adapt` makes; fewer if
            quantiles coincide. Defaults to `10`.
        embedding_dim: As in `Categorical`. Defaults to `None`.
        table: As in `Categorical`. Defaults to `None`.

    Raises:
        ValueError: If an argument is out of range or of the wrong kind, or
            the boundaries do not ascend.

    Example:

    >>> age = keras_moe.layers.Bucketized("age", boundaries=[18, 30, 65])
    >>> age.num_ids
    4
    """

    input_dtype = "float32"

    def __init__(
        self,
        name,
        boundaries=None,
        num_buckets=10,
        embedding_dim=None,
        table=None,
    ):
        super().__init__(name, embedding_dim=embedding_dim, table=table)
        check_int("num_buckets", num_buckets, 2)
        self.num_buckets = num_buckets
        self.boundaries = None
        if boundaries is not None:
            check_ordered("boundaries", boundaries)
            if hasattr(boundaries, "tolist"):  # An array of any backend.
                boundaries = boundaries.tolist()
            for boundary in boundaries:
                check_number("boundaries", boundary)
            boundaries = [float(b) for b in boundaries]
            if not boundaries or boundaries != sorted(set(boundaries)):
                raise ValueError(
                    "`boundaries` must be ascending, and not empty. "
                    f"Received: boundaries={boundaries}"
                )
            self.boundaries = boundaries

    @property
    def num_ids(self):
        return None if self.boundaries is None else len(self.boundaries) + 1

    @property
    def lacks(self):
        return "`boundaries`" if self.boundaries is None else None

    def statistics(self):
        return _Sample(self.name) if self.lacks else None

    def adapt(self, statistics):
        values = statistics.values()
        if not values.size:
            raise ValueError(
                f"All numbers of feature {self.name!r} are missing."
            )
        shares = np.arange(1, self.num_buckets) / self.num_buckets
        boundaries = np.unique(np.quantile(values, shares).astype("float32"))
        self.boundaries = [float(b) for b in boundaries]

    def encode(self, values, missing):
        values = as_floats(values, missing, self.name)
        check_finite(self.name, values)
        return values.astype("float32")

    def check(self, values):
        Feature.check(self, values)

    def rows(self, ids):
        x = ops.expand_dims(ops.cast(ids, "float32"), -1)
        boundaries = ops.convert_to_tensor(self.boundaries, "float32")
        bucket = ops.sum(ops.cast(x >= boundaries, "int32"), axis=-1)
        missing = ops.isnan(ops.squeeze(x, -1))
        return super().rows(ops.where(missing, MISSING, bucket))

    def get_config(self):
        return {
            "name": self.name,
            "boundaries": self.boundaries,
            "num_buckets": self.num_buckets,
            "embedding_dim": self.embedding_dim,
            "table": self.table,
        }


class _Sample:
    """A uniform sample of at most `size` of all numbers seen."""

    size = 100_000

    def __init__(self, name):
        self.name = name
        self.random = np.random.default_rng(0)
        self.kept = np.empty(0)
        self.keys = np.empty(0)

    def update(self, values, missing):
        x = as_floats(values, missing, self.name).ravel()
        check_finite(self.name, x)
        x = x[~np.isnan(x)]
        self.kept = np.concatenate([self.kept, x])
        self.keys = np.concatenate([self.keys, self.random.random(x.size)])
        if self.kept.size > self.size:
            chosen = np.argpartition(self.keys, self.size)[: self.size]
            self.kept, self.keys = self.kept[chosen], self.keys[chosen]

    def values(self):
        return self.kept
