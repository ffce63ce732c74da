"""Ids of values by hashing: the same in every process, on every machine."""

import hashlib

import numpy as np

from keras_moe.recommendation.features.columns import plain


def hashed_ids(values, num_buckets):
    """Hashes an array of values to ids from 0 to `num_buckets - 1`.

    Whole numbers are mixed by SplitMix64, whatever their dtype: a column of
    ints becomes one of floats where some are missing. All other values are
    hashed as text, by BLAKE2b. (Python's own hash of text differs between
    processes.)
    """
    values = np.asarray(values)
    if values.dtype.kind == "f" and (values == np.floor(values)).all():
        if (np.abs(values) < 2**53).all():
            values = values.astype("int64")
    if values.dtype.kind in "biu":
        hashes = _mixed(values)
    else:
        values = [plain(value) for value in values]
        known = {value: _hash(value) for value in set(values)}
        hashes = np.array([known[value] for value in values], "uint64")
    return (hashes % np.uint64(num_buckets)).astype("int32")


def _hash(value):
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(_mixed(np.array([value % 2**64], "uint64"))[0])
    digest = hashlib.blake2b(str(value).encode("utf-8"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _mixed(numbers):
    """The finalizer of SplitMix64; unsigned arithmetic wraps around."""
    x = numbers.astype("uint64") + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
