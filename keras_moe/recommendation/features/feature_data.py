import keras
import numpy as np

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_ordered
from keras_moe.recommendation.features.columns import column
from keras_moe.recommendation.features.columns import is_table
from keras_moe.recommendation.features.columns import tables
from keras_moe.recommendation.features.feature import Feature
from keras_moe.recommendation.features.infer import infer_features
from keras_moe.recommendation.features.sharing import adopt_vocabularies
from keras_moe.recommendation.features.sharing import statistics_of


class FeatureData:
    """The part of a `FeatureEmbedding` that works on data, in NumPy.

    It needs the attributes `features` and `built`.
    """

    @classmethod
    def from_data(
        cls,
        data,
        categorical=(),
        numeric=(),
        multi_categorical=(),
        bucketized=(),
        exclude=(),
        max_vocabulary=None,
        min_count=1,
        **kwargs,
    ):
        """Makes a feature of each column, and adapts them all.

        Strings, booleans and pandas categories become `Categorical`, numbers
        `Numeric`, lists (or rows) of floats `Embedded`, and other lists
        `MultiCategorical`. Name columns of numeric ids in `categorical`, and
        labels in `exclude`. Columns of dates are an error, and dates in strings
        become categories: convert them to numbers first.

        Args:
            data: As in `adapt`. The first table of a stream decides what the
                columns are.
            categorical: Names of columns for `Categorical`. Defaults to `()`,
                as all of these.
            numeric: Names of columns for `Numeric`.
            multi_categorical: Names of columns for `MultiCategorical`.
            bucketized: Names of columns for `Bucketized`.
            exclude: Names of columns to leave out.
            max_vocabulary: As in `Categorical`. Defaults to `None`.
            min_count: As in `Categorical`. Defaults to `1`.
            **kwargs: Arguments of `FeatureEmbedding`.

        Returns:
            A `FeatureEmbedding`.

        Raises:
            ValueError: If `data` is empty or no table, a name is not the name
                of a column or is in two lists, or the kind of a column cannot
                be inferred.
        """
        stream = tables(data)
        first = next(stream, None)
        if first is None:
            raise ValueError("`data` must not be empty.")
        features = infer_features(
            first,
            categorical,
            numeric,
            multi_categorical,
            bucketized,
            exclude,
            max_vocabulary,
            min_count,
        )
        layer = cls(features, **kwargs)

        def again():
            yield first
            yield from stream

        layer.adapt(again())
        return layer

    def adapt(self, data):
        """Learns what features lack: vocabularies, means, boundaries.

        Settings that a feature was given, or has already learned, stay.
        Features that share a table learn one vocabulary together.

        Args:
            data: A pandas frame, a dict of arrays or lists, or an iterable of
                these (or of tuples that begin with one, as batches of `fit`
                do), which is read once.

        Raises:
            ValueError: If the layer is already built, or a column is missing
                or of the wrong kind.
        """
        if self.built:
            raise ValueError(
                "The layer is already built: its tables have their sizes. "
                "Call `adapt` before the layer or a model is called."
            )
        adopt_vocabularies(self.features)
        statistics = statistics_of(self.features)
        for table in tables(data):
            for feature in self.features:
                if statistics[feature.name] is not None:
                    statistics[feature.name].update(
                        *column(table, feature.name)
                    )
        for feature in self.features:
            if statistics[feature.name] is not None:
                feature.adapt(statistics[feature.name])

    def encode(self, data):
        """Turns a pandas frame or a dict of columns into inputs of a model.

        Values that are not in a vocabulary become unknown; NaN and `None`
        become missing. Columns without a feature are left out.

        Args:
            data: A pandas frame or a dict of arrays or lists.

        Returns:
            Dict of NumPy arrays by feature.

        Raises:
            ValueError: If a column is missing, is of the wrong kind, or has
                ids out of range.
        """
        if not is_table(data):
            raise ValueError(
                "`data` must be a pandas frame or a dict of columns. "
                f"Received: {type(data).__name__}"
            )
        self._check_adapted()
        columns = {f.name: column(data, f.name) for f in self.features}
        lengths = {name: len(values) for name, (values, _) in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"`data` must have columns of one length. Received: {lengths}"
            )
        return {f.name: f.encode(*columns[f.name]) for f in self.features}

    def check_data(self, data):
        """Raises if NumPy arrays are not what the layer takes.

        Args:
            data: Dict of arrays by feature, or of TensorFlow's tensor specs.
                Entries without a feature are ignored. Only NumPy arrays and
                pandas columns are checked value by value.

        Raises:
            ValueError: If a feature is missing or does not fit.
        """
        self._check_names(data)
        for feature in self.features:
            values = data[feature.name]
            if hasattr(values, "to_numpy"):
                values = values.to_numpy()
            if isinstance(values, np.ndarray):
                feature.check(values)
            elif hasattr(getattr(values, "dtype", None), "as_numpy_dtype"):
                feature.check_dtype(values.dtype.name, unseen=True)

    def inputs(self):
        """A dict of `keras.Input` by feature, to make a model with.

        Raises:
            ValueError: If a feature still lacks what `adapt` learns.
        """
        self._check_adapted()
        return {
            feature.name: feature.keras_input() for feature in self.features
        }

    def _check_names(self, data):
        missing = [f.name for f in self.features if f.name not in data]
        if missing:
            raise ValueError(
                f"Features are missing from the inputs: {missing}. "
                f"Received: {sorted(data)}"
            )

    def _check_adapted(self):
        for feature in self.features:
            if feature.lacks is not None:
                raise ValueError(
                    f"{feature!r} lacks {feature.lacks}: give it, or call "
                    "`adapt` with data first."
                )


def as_features(features):
    """A list of features, from features or their configs."""
    check_ordered("features", features)
    checked = []
    for feature in features:
        if isinstance(feature, dict):
            feature = as_keras_object(
                "features", keras.saving.deserialize_keras_object, feature
            )
        if not isinstance(feature, Feature):
            raise ValueError(
                "`features` must be a list of features such as "
                f"keras_moe.layers.Categorical. Received: features={features!r}"
            )
        checked.append(feature)
    names = [feature.name for feature in checked]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            "`features` must hold at least one, with different names. "
            f"Received: {names}"
        )
    return checked
