"""Columns of pandas frames, dicts and batches of a stream, in NumPy."""

import numpy as np


def is_table(data):
    """Whether `data` is a frame or a dict of columns, not a stream of them."""
    return isinstance(data, dict) or hasattr(data, "columns")


def tables(data):
    """Yields one table, or each of a stream of tables or `(table, ...)`."""
    if is_table(data):
        yield data
        return
    try:
        batches = iter(data)
    except TypeError as error:
        raise ValueError(
            "`data` must be a pandas frame, a dict of arrays, or an iterable "
            f"of these. Received: data={data!r}"
        ) from error
    for batch in batches:
        table = batch[0] if isinstance(batch, (list, tuple)) else batch
        if not is_table(table):
            raise ValueError(
                "`data` must be a pandas frame, a dict of arrays, or an "
                "iterable of these (or of tuples that begin with one). "
                f"Received an entry of type {type(table).__name__}"
            )
        yield table


def column_names(table):
    return list(table) if isinstance(table, dict) else list(table.columns)


def column(table, name):
    """The values of a column, and a mask of the missing ones.

    NaN, `None` and `pandas.NA` are missing values.
    """
    if name not in column_names(table):
        raise ValueError(
            f"No column {name!r} in the data. "
            f"Received: {sorted(map(str, column_names(table)))}"
        )
    given = table[name]
    is_missing = given.isna() if hasattr(given, "isna") else None
    values = to_numpy(given)
    if not values.ndim:
        raise ValueError(
            f"Column {name!r} must be an array or a list, of one row or more. "
            f"Received: {given!r}"
        )
    if values.dtype.kind in "mM":
        raise ValueError(
            f"Column {name!r} holds dates or times, whose unit may differ from "
            "table to table. Convert them to numbers or strings first, as days "
            f"or weekdays. Received: dtype={values.dtype}"
        )
    if is_missing is not None:
        if values.dtype.kind == "f" and given.dtype.kind != "f":
            # pandas would round ints to floats if one is missing.
            values = given.to_numpy(object)
        return values, np.asarray(is_missing)
    return values, missing(values)


def to_numpy(values):
    """An array; lists of different lengths become an array of lists."""
    if isinstance(values, (list, tuple)):
        if any(isinstance(v, (list, tuple, np.ndarray)) for v in values):
            rows = np.empty(len(values), object)
            for i, value in enumerate(values):
                rows[i] = value
            return rows
        # NumPy would convert NaNs among strings to strings.
        is_text = any(isinstance(v, (str, bytes)) for v in values)
        given, values = values, np.asarray(values, object if is_text else None)
        # It would also round large ints to floats.
        if values.dtype.kind == "f" and any(
            isinstance(v, int) and abs(v) > 2**53 for v in given
        ):
            values = np.asarray(given, object)
    values = np.asarray(values)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8")
    return values


def missing(values):
    """A mask of the missing values of an array."""
    if values.dtype.kind == "f":
        return np.isnan(values)
    if values.dtype.kind != "O":
        return np.zeros(values.shape, bool)
    flags = [_is_missing(value) for value in values.ravel()]
    return np.array(flags, bool).reshape(values.shape)


def _is_missing(value):
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating)) and value != value


def plain(value):
    """The Python value of a NumPy scalar; bytes become a string."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.item() if isinstance(value, np.generic) else value


def as_floats(values, is_missing, name):
    """float64 values, NaN where they are missing."""
    if values.dtype.kind in "biuf":
        return values.astype("float64")
    if values.dtype.kind == "c":
        raise ValueError(
            f"Feature {name!r} must be made of real numbers. Received: "
            f"dtype={values.dtype}"
        )
    floats = np.full(values.shape, np.nan)
    try:
        floats[~is_missing] = values[~is_missing].astype("float64")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Feature {name!r} must be made of numbers. Received: "
            f"dtype={values.dtype}, with {values[~is_missing][0]!r}"
        ) from error
    return floats
