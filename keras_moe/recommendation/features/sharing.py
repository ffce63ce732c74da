"""Features that share one table of vectors."""

from keras_moe.recommendation.features.bucketized import Bucketized


def adopt_vocabularies(features):
    """Features without a vocabulary take the one of their table, if any."""
    for table in _tables(features):
        known = [f for f in table if f.num_ids is not None]
        for feature in table if known else ():
            if feature.num_ids is None:
                feature.take_ids_of(known[0])


def statistics_of(features):
    """Statistics by feature name; features of one table count together."""
    statistics = {f.name: f.statistics() for f in features}
    for table in _tables(features):
        counting = [statistics[f.name] for f in table if f.num_ids is None]
        for other in counting[1:]:
            other.share(counting[0])
    return statistics


def _tables(features):
    tables = {}
    for feature in features:
        if feature.table is not None and not isinstance(feature, Bucketized):
            tables.setdefault(feature.table, []).append(feature)
    return tables.values()


def check_shared(features):
    """Raises if features that share a table disagree about it."""
    first = {}
    for feature in features:
        if feature.table is None:
            continue
        other = first.setdefault(feature.table, feature)
        for attribute in ("num_ids", "embedding_dim", "vocabulary"):
            here = getattr(feature, attribute)
            there = getattr(other, attribute)
            # The ids of one may be positions in the vocabulary of the other.
            one_is_none = attribute == "vocabulary" and None in (here, there)
            if here != there and not one_is_none:
                shown = attribute != "vocabulary"
                raise ValueError(
                    f"{feature!r} and {other!r} share the table "
                    f"{feature.table!r} and must have one `{attribute}`."
                    + (f" Received: {here} and {there}" if shown else "")
                )
        if _makes_ids(feature) | _makes_ids(other) == {"vocabulary", "hash"}:
            raise ValueError(
                f"{feature!r} and {other!r} share the table "
                f"{feature.table!r}, but only one of them has a vocabulary, "
                "and the other hashes its values."
            )


def _makes_ids(feature):
    """How a feature turns values into ids, if it does."""
    kinds = set()
    if feature.vocabulary is not None:
        kinds.add("vocabulary")
    if feature.num_hash_buckets is not None:
        kinds.add("hash")
    return kinds
