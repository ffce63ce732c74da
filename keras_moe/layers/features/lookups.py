"""Many small tables of vectors, read as one."""

import itertools

import numpy as np
from keras import ops

from keras_moe.layers.features.categorical import Categorical
from keras_moe.layers.features.categorical import rows_of

# Tables of up to so many rows are put together in each call. That copies them,
# and costs less than to read each on its own.
SMALL = 1024


def embed_small(features, inputs, tables, joined=False):
    """The vectors of features with one id and a small table.

    Args:
        features: List of all features.
        inputs: Dict of tensors by feature.
        tables: Dict of `keras.layers.Embedding` by table.
        joined: bool. Whether the vectors of features that follow each other
            may stay one: it is at the first, `None` at the others.

    Returns:
        Dict of tensors `(B, width)` by feature, of some features.
    """
    by_width = {}
    for place, feature in enumerate(features):
        if _is_small(feature, tables):
            by_width.setdefault(feature.embedding_dim, []).append(place)
    vectors = {}
    for width, places in by_width.items():
        if len(places) == 1:
            continue
        group = [features[place] for place in places]
        values = _one_table(group, inputs, tables)  # (B, group, width)
        runs = _runs(places) if joined else [[place] for place in places]
        ends = np.cumsum([width * len(run) for run in runs])
        values = ops.reshape(values, (-1, int(ends[-1])))
        parts = [values]
        if len(runs) > 1:
            parts = ops.split(values, ends[:-1].tolist(), axis=-1)
        for run, part in zip(runs, parts, strict=True):
            first, *others = (features[place].name for place in run)
            vectors.update({first: part, **dict.fromkeys(others)})
    return vectors


def _is_small(feature, tables):
    # A subclass may read its ids in its own way, a quantized table its rows.
    if type(feature) is not Categorical:
        return False
    table = tables[feature.table]
    return table.input_dim <= SMALL and table.quantization_mode is None


def _runs(places):
    """`[0, 1, 4, 5]` -> `[[0, 1], [4, 5]]`."""
    keyed = itertools.groupby(enumerate(places), lambda item: item[1] - item[0])
    return [[place for _, place in run] for _, run in keyed]


def _one_table(features, inputs, tables):
    names = list(dict.fromkeys(feature.table for feature in features))
    values = ops.concatenate([tables[name].embeddings for name in names])
    # So that TensorFlow makes the gradient dense before it cuts it up.
    values = ops.reshape(values, (-1, values.shape[-1]))
    sizes = [tables[name].input_dim for name in names]
    starts = dict(zip(names, np.cumsum([0, *sizes[:-1]]), strict=True))
    ids = [ops.cast(inputs[feature.name], "int32") for feature in features]
    rows = rows_of(
        ops.stack(ids, axis=1),
        ops.convert_to_tensor([f.num_ids for f in features], "int32"),
    )
    start = np.array([starts[feature.table] for feature in features])
    rows = rows + ops.convert_to_tensor(start, "int32")
    return ops.take(values, rows, axis=0)
