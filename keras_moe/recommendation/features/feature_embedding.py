import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.recommendation.features.feature_data import FeatureData
from keras_moe.recommendation.features.feature_data import checked_features
from keras_moe.recommendation.features.sharing import check_shared
from keras_moe.recommendation.features.vector_tables import embed_together
from keras_moe.recommendation.features.vector_tables import make_tables


@keras.saving.register_keras_serializable("keras_moe")
class FeatureEmbedding(FeatureData, keras.layers.Layer):
    """One vector of the features of an example.

    Each feature gives a vector: `Categorical`, `MultiCategorical`, `Sequence`
    and `Bucketized` from a table of learned vectors, `Numeric` and `Embedded`
    from its own values. Features that name the same `table` share it.

    What a model takes are numbers. Strings, missing values and lists of any
    length become numbers in NumPy, with the data: `encode` makes arrays of a
    pandas frame or a dict of columns. What features need to know of the data
    (vocabularies, means, boundaries of buckets) is given to them, or learned by
    `adapt` or `from_data` from a frame, a dict or a stream of these, such as a
    `tf.data.Dataset` or a generator of batches. All that is saved with the
    layer, so that a loaded model can still encode:
    `model.get_layer("features").encode(frame)`.

    Small tables of one width (up to 1024 rows) are rows of one variable, which
    is faster to read, to update and to compile than dozens; unless the
    initializer or the regularizer would notice. `vectors` gives the vectors of
    one table.

    Args:
        features: List of features. What they lack, `embedding_dim` too, is
            written into them: they belong to this layer.
        embedding_dim: int. Width of the vectors of tables, for features that
            say none. Defaults to `16`.
        output: `"concat"` for one tensor, `"stack"` for the vectors side by
            side, which must then be of one width, or `"dict"` for a dict by
            feature. Defaults to `"concat"`.
        embeddings_initializer: Initializer of the tables. Defaults to
            `"uniform"`.
        embeddings_regularizer: Regularizer of the tables. Defaults to `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Dict of tensors by feature: ids `(batch,)`, lists
            `(batch, length)`, numbers `(batch,)`, vectors `(batch, dim)`. Other
            entries are ignored.

    Output shape:
        `(batch, sum of widths)`, `(batch, num_features, width)`, or a dict of
        `(batch, width)`.

    Raises:
        ValueError: If arguments are out of range, two features have one name,
            or features share a table but differ in its size; when built, if a
            feature still lacks what `adapt` would learn; when called, if the
            input of a feature is not there.

    Example:

    >>> data = {"city": ["Rome", "Oslo", "Rome"], "age": [31.0, 40.0, None]}
    >>> features = keras_moe.layers.FeatureEmbedding.from_data(
    ...     data, embedding_dim=4)
    >>> features(features.encode(data)).shape[1]
    5
    """

    def __init__(
        self,
        features,
        embedding_dim=16,
        output="concat",
        embeddings_initializer="uniform",
        embeddings_regularizer=None,
        **kwargs,
    ):
        # A price must not be rounded to half precision before it is scaled.
        super().__init__(autocast=False, **{"name": "features", **kwargs})
        check_int("embedding_dim", embedding_dim, 1)
        check_one_of("output", output, ("concat", "stack", "dict"))
        self.features = checked_features(features)
        self.embedding_dim = embedding_dim
        self.output_kind = output
        self.embeddings_initializer = as_keras_object(
            "embeddings_initializer",
            keras.initializers.get,
            embeddings_initializer,
        )
        self.embeddings_regularizer = as_keras_object(
            "embeddings_regularizer",
            keras.regularizers.get,
            embeddings_regularizer,
        )
        for feature in self.features:
            if feature.table is not None and feature.embedding_dim is None:
                feature.embedding_dim = embedding_dim
        # Layers are tracked, and saved, in what holds them here.
        self._combiners = [
            feature.layer
            for feature in self.features
            if getattr(feature, "layer", None) is not None
        ]

    def build(self, input_shape=None):
        self._check_adapted()
        check_shared(self.features)
        self._tables = make_tables(
            self.features,
            self.embeddings_initializer,
            self.embeddings_regularizer,
            self.dtype_policy,
        )
        # Where Keras finds the layers, each once.
        self._embeddings = list(
            dict.fromkeys(table.embedding for table in self._tables.values())
        )
        for feature in self.features:
            layer = getattr(feature, "layer", None)
            if layer is not None and not layer.built:
                layer.build((None, feature.length, feature.embedding_dim))
        widths = {feature.width for feature in self.features}
        if self.output_kind == "stack" and len(widths) > 1:
            raise ValueError(
                "With output='stack' all features must be of one width. "
                f"Received: { {f.name: f.width for f in self.features} }"
            )

    def vectors(self, table):
        """The vectors of a table, as they are now.

        Args:
            table: str. Its name, by default the name of its feature.

        Returns:
            NumPy array `(num_ids + 2, embedding_dim)`: of missing values, of
            unknown ones, and then of the ids from 0.

        Raises:
            ValueError: If there is no such table, or the layer is not built.
        """
        tables = self._tables if self.built else {}
        if table not in tables:
            raise ValueError(
                "`table` must be the name of a table of a layer that is built. "
                f"Received: table={table!r}, tables: {list(tables)}"
            )
        return ops.convert_to_numpy(tables[table].vectors())

    def call(self, inputs):
        self._check_names(inputs)
        tensors = {f.name: _tensor(f, inputs[f.name]) for f in self.features}
        vectors = embed_together(
            self.features,
            tensors,
            self._tables,
            joined=self.output_kind == "concat",
        )
        for feature in self.features:
            if feature.name not in vectors:
                table = self._tables.get(feature.table)
                vectors[feature.name] = feature.embed(
                    tensors[feature.name], table
                )
        vectors = {
            f.name: ops.cast(vectors[f.name], self.compute_dtype)
            for f in self.features
            if vectors[f.name] is not None
        }
        if self.output_kind == "dict":
            return vectors
        if self.output_kind == "stack":
            return ops.stack(list(vectors.values()), axis=1)
        return ops.concatenate(list(vectors.values()), axis=-1)

    def compute_output_shape(self, input_shape):
        batch = input_shape[self.features[0].name][0]
        widths = {feature.name: feature.width for feature in self.features}
        if self.output_kind == "dict":
            return {name: (batch, width) for name, width in widths.items()}
        if self.output_kind == "stack":
            return (batch, len(widths), self.features[0].width)
        return (batch, sum(widths.values()))

    def get_config(self):
        return {
            **super().get_config(),
            "features": [
                keras.saving.serialize_keras_object(feature)
                for feature in self.features
            ],
            "embedding_dim": self.embedding_dim,
            "output": self.output_kind,
            "embeddings_initializer": keras.initializers.serialize(
                self.embeddings_initializer
            ),
            "embeddings_regularizer": keras.regularizers.serialize(
                self.embeddings_regularizer
            ),
        }


def _tensor(feature, x):
    x = ops.convert_to_tensor(x)
    if len(x.shape) == 2 and not feature.input_shape:
        return ops.squeeze(x, axis=1)
    return x
