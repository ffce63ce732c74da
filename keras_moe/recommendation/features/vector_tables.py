"""Tables of vectors: where they are kept, and how their rows are read."""

import itertools
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe.recommendation.features.categorical import Categorical
from keras_moe.recommendation.features.categorical import rows_of
from keras_moe.recommendation.features.feature import layer_name
from keras_moe.stacked.draws import own_draws

# Tables of up to this many rows share a variable: each variable takes time in
# every step, and more when the step is compiled.
SMALL = 1024

# With these, tables in one variable behave as tables in several.
ELEMENTWISE_INITIALIZERS = (
    keras.initializers.Constant,
    keras.initializers.RandomNormal,
    keras.initializers.RandomUniform,
    keras.initializers.TruncatedNormal,
    keras.initializers.Zeros,
)
ADDITIVE_REGULARIZERS = (
    keras.regularizers.L1,
    keras.regularizers.L1L2,
    keras.regularizers.L2,
    type(None),
)


class VectorTable(NamedTuple):
    """Rows of a `keras.layers.Embedding`."""

    embedding: keras.layers.Embedding
    start: int
    size: int

    def __call__(self, rows):
        return self.embedding(rows + self.start if self.start else rows)

    def vectors(self):
        stop = self.start + self.size
        if self.embedding.quantization_mode is not None:
            return self.embedding(ops.arange(self.start, stop))
        return self.embedding.embeddings[self.start : stop]


def make_tables(features, initializer, regularizer, dtype):
    """Makes the tables of features, small ones of one width together.

    Args:
        features: List of features.
        initializer: Initializer of the vectors.
        regularizer: Regularizer of the vectors, or `None`.
        dtype: dtype, or policy, of the vectors.

    Returns:
        Dict of `VectorTable` by name.
    """
    sizes, groups = {}, {}
    together = isinstance(initializer, ELEMENTWISE_INITIALIZERS)
    together &= isinstance(regularizer, ADDITIVE_REGULARIZERS)
    for feature in features:
        name = feature.table
        if name is None or name in sizes:
            continue
        sizes[name] = feature.num_ids + 2
        alone = not together or sizes[name] > SMALL
        group = (feature.embedding_dim, name if alone else None)
        groups.setdefault(group, []).append(name)
    tables = {}
    for number, ((width, _), names) in enumerate(groups.items()):
        rows = [sizes[name] for name in names]
        embedding = keras.layers.Embedding(
            sum(rows),
            width,
            embeddings_initializer=own_draws(initializer, number),
            embeddings_regularizer=regularizer,
            dtype=dtype,
            name=layer_name(f"table_{names[0]}")
            if len(names) == 1
            else f"tables_of_width_{width}",
        )
        embedding.build((None,))
        starts = np.cumsum([0, *rows[:-1]]).tolist()
        for name, start, size in zip(names, starts, rows, strict=True):
            tables[name] = VectorTable(embedding, start, size)
    return tables


def embed_together(features, inputs, tables, joined=False):
    """Looks up at once the features with one id whose tables are together.

    Args:
        features: List of all features.
        inputs: Dict of tensors by feature.
        tables: Dict of `VectorTable` by name.
        joined: bool. Whether vectors of consecutive features may stay one
            tensor: the first feature then has it, and the others have `None`.
            Defaults to `False`.

    Returns:
        Dict of tensors `(B, width)` by feature, for the features looked up.
    """
    groups = {}
    for place, feature in enumerate(features):
        # A subclass may read ids in its own way.
        if type(feature) is Categorical:
            embedding = tables[feature.table].embedding
            groups.setdefault(embedding.name, []).append(place)
    vectors = {}
    for places in groups.values():
        if len(places) == 1:
            continue
        group = [features[place] for place in places]
        values = _read(group, inputs, tables)  # (B, group, width)
        width = values.shape[-1]
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


def _read(features, inputs, tables):
    ids = [ops.cast(inputs[feature.name], "int32") for feature in features]
    rows = rows_of(
        ops.stack(ids, axis=1),
        ops.convert_to_tensor([f.num_ids for f in features], "int32"),
    )
    starts = [tables[feature.table].start for feature in features]
    rows = rows + ops.convert_to_tensor(starts, "int32")
    embedding, _, size = tables[features[0].table]
    if embedding.quantization_mode is not None or size > SMALL:
        return embedding(rows)
    # TensorFlow takes longer to update a few rows than all of them.
    values = ops.convert_to_tensor(embedding.embeddings)
    return ops.take(ops.reshape(values, (-1, values.shape[-1])), rows, axis=0)


def _runs(places):
    """`[0, 1, 4, 5]` -> `[[0, 1], [4, 5]]`."""
    keyed = itertools.groupby(enumerate(places), lambda item: item[1] - item[0])
    return [[place for _, place in run] for _, run in keyed]
