import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.recommendation.features.categorical import MISSING
from keras_moe.recommendation.features.multi_categorical import COMBINERS
from keras_moe.recommendation.features.multi_categorical import MultiCategorical
from keras_moe.recommendation.features.multi_categorical import combine


@keras.saving.register_keras_serializable("keras_moe")
class Sequence(MultiCategorical):
    """A history of values in order of time, the latest last.

    It works like `MultiCategorical`, with two differences: a sequence that is
    too long keeps its last entries, and the vector may depend on the order
    (`combiner="last"` or a layer).

    Args:
        name: str. Name of the feature.
        vocabulary: As in `Categorical`. Defaults to `None`.
        num_ids: As in `Categorical`. Defaults to `None`.
        embedding_dim: As in `Categorical`. Defaults to `None`.
        table: As in `Categorical`. A history of items and the item itself
            should share one. Defaults to `None`.
        length: As in `MultiCategorical`. Defaults to `None`.
        combiner: `"mean"`, `"sum"`, `"sqrtn"`, `"max"`, `"last"` (the vector of
            the last entry that is not padding), or a layer that is called as
            `layer(vectors (B, L, D), mask=mask (B, L))` and gives `(B, O)`, for
            example `keras.layers.GRU(16)`. Defaults to `"mean"`.
        mask_id: As in `MultiCategorical`. Defaults to `-1`.
        separator: As in `MultiCategorical`. Defaults to `None`.
        max_vocabulary: As in `Categorical`. Defaults to `None`.
        min_count: As in `Categorical`. Defaults to `1`.
        num_hash_buckets: As in `Categorical`. Defaults to `None`.

    Raises:
        ValueError: If an argument is out of range or of the wrong kind, or
            arguments do not fit together.

    Example:

    >>> layer = keras_moe.layers.FeatureEmbedding([
    ...     keras_moe.layers.Categorical("item", num_ids=100),
    ...     keras_moe.layers.Sequence(
    ...         "history", num_ids=100, table="item", length=20),
    ... ])
    """

    keeps_last = True

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
        if isinstance(combiner, dict):
            combiner = as_keras_object(
                "combiner", keras.saving.deserialize_keras_object, combiner
            )
        super().__init__(
            name=name,
            vocabulary=vocabulary,
            num_ids=num_ids,
            embedding_dim=embedding_dim,
            table=table,
            length=length,
            combiner=combiner,
            mask_id=mask_id,
            separator=separator,
            max_vocabulary=max_vocabulary,
            min_count=min_count,
            num_hash_buckets=num_hash_buckets,
        )

    def check_combiner(self, combiner):
        known = (*COMBINERS, "last")
        is_known = isinstance(combiner, str) and combiner in known
        if not is_known and not isinstance(combiner, keras.layers.Layer):
            raise ValueError(
                f"`combiner` must be one of {known} or a layer. "
                f"Received: combiner={combiner!r}"
            )

    @property
    def layer(self):
        """The layer that combines, or `None`."""
        return None if isinstance(self.combiner, str) else self.combiner

    def embed(self, inputs, table=None):
        mask = ops.logical_and(inputs != self.mask_id, inputs != MISSING)
        vectors = table(self.rows(inputs))
        if self.layer is not None:
            return self.layer(vectors, mask=mask)
        if self.combiner == "last":
            # The entry with the largest position that is not padding.
            places = ops.cumsum(ops.cast(mask, "int32"), axis=1)
            is_last = ops.logical_and(mask, places == places[:, -1:])
            return combine(vectors, is_last, "sum")
        return combine(vectors, mask, self.combiner)

    @property
    def width(self):
        if self.layer is None:
            return self.embedding_dim
        return self.layer.compute_output_shape(
            (None, self.length, self.embedding_dim)
        )[-1]

    def get_config(self):
        config = super().get_config()
        if self.layer is not None:
            config["combiner"] = keras.saving.serialize_keras_object(self.layer)
            config["combiner"].pop("build_config", None)
        return config
