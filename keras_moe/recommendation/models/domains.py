"""The domain of each example."""

import keras
import numpy as np
from keras import ops

from keras_moe.checks import check_int
from keras_moe.recommendation.features.categorical import Categorical
from keras_moe.recommendation.features.feature_embedding import FeatureEmbedding


def check_domain(domain, num_domains):
    """Checks the arguments of a model whose domain is one input."""
    if not isinstance(domain, str):
        raise ValueError(
            "`domain` must be the name of an input. "
            f"Received: domain={domain!r}"
        )
    check_num_domains(num_domains)


def check_num_domains(num_domains):
    if num_domains is not None:
        check_int("num_domains", num_domains, 1)


def domain_of(inputs, embedding, domain, num_domains=None):
    """The domain of each example, and how many domains there are.

    Args:
        inputs: Dict of `keras.Input` by name.
        embedding: The embedding of the model.
        domain: Name of a `keras_moe.layers.Categorical` of a
            `keras_moe.layers.FeatureEmbedding`, or of any other integer input
            with values from `0` to `num_domains - 1`.
        num_domains: int. Number of domains. Defaults to `None`, for a
            `Categorical`: missing values are domain 0, unknown ones domain 1,
            and id `i` is domain `i + 2`.

    Returns:
        `(int tensor (B,), num_domains)`.

    Raises:
        ValueError: If there is no such input, its values are not integers, or
            `num_domains` is missing or wrong.
    """
    feature = named_feature(embedding, domain)
    if not isinstance(inputs, dict) or domain not in inputs:
        raise ValueError(
            "`domain` must be the name of an input. Received: "
            f"domain={domain!r}, inputs="
            f"{sorted(inputs) if isinstance(inputs, dict) else inputs}"
        )
    ids = inputs[domain]
    if isinstance(feature, Categorical) and not feature.input_shape:
        if num_domains not in (None, feature.num_ids + 2):
            raise ValueError(
                f"Feature {domain!r} has {feature.num_ids} ids. With missing "
                "and unknown values, `num_domains` must be "
                f"{feature.num_ids + 2} or None. "
                f"Received: num_domains={num_domains!r}"
            )
        return feature.rows(ids), feature.num_ids + 2
    shape = tuple(ids.shape)
    if "int" not in ids.dtype or shape[1:] not in ((), (1,)):
        raise ValueError(
            "`domain` must be the name of an integer input of shape (batch,) "
            "or of a Categorical feature. Received: "
            f"domain={domain!r}, shape={shape}, dtype={ids.dtype}"
        )
    check_int("num_domains", num_domains, 1)
    ids = ops.cast(ids, "int32")
    return ids if len(shape) == 1 else ops.squeeze(ids, axis=1), num_domains


def named_feature(embedding, name):
    """The feature of a `FeatureEmbedding`, or `None`."""
    if not isinstance(embedding, FeatureEmbedding):
        return None
    return next((f for f in embedding.features if f.name == name), None)


def one_hot(ids, number):
    """`(B,)` -> `(B, number)`, zeros for ids out of range."""
    known = np.arange(number, dtype="int32")
    ids = ops.cast(ops.expand_dims(ids, 1), "int32")
    return ops.cast(ops.equal(ids, known), keras.config.floatx())


def known_of(names, inputs, embedding, vectors, num_domains=None):
    """The vectors of features or domains side by side, `(B, width)`.

    Args:
        names: Name, or sequence of names. A feature gives its vector. Another
            integer input, as in `domain_of`, gives a one-hot vector.
        inputs: Dict of `keras.Input` by name.
        embedding: The embedding of the model.
        vectors: Dict of the vectors `(B, width)` of features by name.
        num_domains: int. Number of domains, for inputs that are not features.
    """
    known = []
    for name in [names] if isinstance(names, str) else names:
        if name in vectors:
            known.append(vectors[name])
            continue
        ids, number = domain_of(inputs, embedding, name, num_domains)
        known.append(one_hot(ids, number))
    return known[0] if len(known) == 1 else ops.concatenate(known, axis=-1)
