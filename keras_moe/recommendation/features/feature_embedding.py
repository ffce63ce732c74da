import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.recommendation.features.feature_data import FeatureData
from keras_moe.recommendation.features.feature_data import as_features
from keras_moe.recommendation.features.sharing import check_shared
from keras_moe.recommendation.features.vector_tables import embed_together
from keras_moe.recommendation.features.vector_tables import make_tables


@keras.saving.register_keras_serializable("keras_moe")
class FeatureEmbedding(FeatureData, keras.layers.Layer):
    """Turns the features of an example into one vector.

    Each feature becomes a vector. `Categorical`, `MultiCategorical`, `Sequence`
    and `Bucketized` look it up in a table of learned vectors; `Numeric` and
    `Embedded` compute it from their values. Features that name the same `table`
    share it.

    A model takes numbers. `encode` makes them in NumPy, from a pandas frame or
    a dict of columns with strings, missing values and lists of any length. For
    that, features know vocabularies, means and boundaries of buckets. These are
    given, or `adapt` or `from_data` learns them from a frame, a dict or a
    stream of these, for example a `tf.data.Dataset` or a generator of batches.
    They are saved with the layer, so that a loaded model can still encode:
    `model.get_layer("features").encode(frame)`.

    Small tables (up to 1024 rows) of the same width are kept in one variable,
    which is faster to read, update and compile than dozens. Tables stay apart
    if the initializer or regularizer depends on the shape of the variable.
    `vectors` returns the vectors of one table.

    Args:
        features: List of features. The layer writes what they lack, also
            `embedding_dim`, into them: do not share them between layers.
        embedding_dim: int. Width of the vectors in tables, for features without
            an `embedding_dim` of their own. Defaults to `16`.
        output: `"concat"` for one tensor, `"stack"` for vectors of the same
            width side by side, or `"dict"` for a dict by feature. Defaults to
            `"concat"`.
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
        ValueError: If an argument is out of range or of the wrong kind, or two
            features have the same name; when built, if features share a table
            but differ in its size, or a feature still lacks what `adapt`
            learns; when called, if the input of a feature is missing.

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
        self.features = as_features(features)
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
        # Keras tracks and saves the layers that an attribute holds.
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
        # For Keras to find each layer once.
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
            table: str. Name of the table: by default its feature's name.

        Returns:
            NumPy array `(num_ids + 2, embedding_dim)`: the vectors of missing
            values, of unknown values, and of the ids from 0.

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
