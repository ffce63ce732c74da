"""Infers features from the columns of a table."""

import numpy as np

from keras_moe.checks import check_int
from keras_moe.checks import check_several
from keras_moe.recommendation.features.bucketized import Bucketized
from keras_moe.recommendation.features.categorical import Categorical
from keras_moe.recommendation.features.columns import column
from keras_moe.recommendation.features.columns import column_names
from keras_moe.recommendation.features.embedded import Embedded
from keras_moe.recommendation.features.multi_categorical import MultiCategorical
from keras_moe.recommendation.features.numeric import Numeric


def infer_features(
    table,
    categorical=(),
    numeric=(),
    multi_categorical=(),
    bucketized=(),
    exclude=(),
    max_vocabulary=None,
    min_count=1,
):
    """One feature for each column of a table, without those in `exclude`.

    Strings, booleans and pandas categories become `Categorical`, numbers
    `Numeric`, lists of floats `Embedded`, and other lists `MultiCategorical`,
    unless an argument names the column.
    """
    if max_vocabulary is not None:
        check_int("max_vocabulary", max_vocabulary, 1)
    check_int("min_count", min_count, 1)
    limits = {"max_vocabulary": max_vocabulary, "min_count": min_count}
    named = {
        "categorical": (categorical, lambda n: Categorical(n, **limits)),
        "numeric": (numeric, Numeric),
        "multi_categorical": (
            multi_categorical,
            lambda n: MultiCategorical(n, **limits),
        ),
        "bucketized": (bucketized, Bucketized),
        "exclude": (exclude, lambda n: None),
    }
    columns, makers = column_names(table), {}
    for argument, (names, make) in named.items():
        if isinstance(names, str):
            names = [names]
        check_several(argument, names)
        for name in names:
            if name not in columns or name in makers:
                raise ValueError(
                    f"`{argument}` must hold names of columns, and no column "
                    f"may be in two lists. Received: {argument}={names!r}, "
                    f"with {name!r}, columns={columns}"
                )
            makers[name] = make
    features = []
    for name in columns:
        if name in makers:
            feature = makers[name](name)
        else:
            feature = _inferred(table, name, limits)
        if feature is not None:
            features.append(feature)
    return features


def _inferred(table, name, limits):
    values, missing = column(table, name)
    kind = values.dtype.kind
    if getattr(getattr(table[name], "dtype", None), "name", "") == "category":
        return Categorical(name, **limits)
    if values.ndim == 2:
        if kind == "f":
            return Embedded(name)
        if kind in "iu":
            return MultiCategorical(name, **limits)
    elif kind in "bU":
        return Categorical(name, **limits)
    elif kind in "iuf":
        return Numeric(name)
    elif kind in "OT" and not missing.all():
        first = values[~missing][0]
        if isinstance(first, (list, tuple, np.ndarray)):
            entries = next((v for v in values[~missing] if len(v)), ())
            if len(entries) and isinstance(entries[0], (float, np.floating)):
                return Embedded(name)
            return MultiCategorical(name, **limits)
        if isinstance(first, (str, bytes, bool, np.bool_)):
            return Categorical(name, **limits)
        if isinstance(first, (int, float, np.number)):
            return Numeric(name)
    raise ValueError(
        f"The kind of column {name!r} cannot be told from its values. Name it "
        "in `categorical`, `numeric`, `multi_categorical`, `bucketized` "
        f"or `exclude`. Received: dtype={values.dtype}, shape={values.shape}"
    )
