"""Reads and splits the Census-Income (KDD) set. There is nothing to run."""

import gzip

import numpy as np

COLUMNS = (
    "age",
    "class_of_worker",
    "industry_code",
    "occupation_code",
    "education",
    "wage_per_hour",
    "enrolled_last_week",
    "marital_status",
    "major_industry",
    "major_occupation",
    "race",
    "hispanic_origin",
    "sex",
    "labor_union",
    "reason_for_unemployment",
    "full_or_part_time",
    "capital_gains",
    "capital_losses",
    "dividends",
    "tax_filer_status",
    "previous_region",
    "previous_state",
    "household_status",
    "household_summary",
    "instance_weight",
    "migration_msa",
    "migration_region",
    "migration_within_region",
    "same_house_a_year_ago",
    "migration_sunbelt",
    "persons_worked_for_employer",
    "family_under_18",
    "birth_country_father",
    "birth_country_mother",
    "birth_country",
    "citizenship",
    "own_business",
    "veterans_questionnaire",
    "veterans_benefits",
    "weeks_worked",
    "year",
    "income",
)
NUMBERS = (
    "age",
    "wage_per_hour",
    "capital_gains",
    "capital_losses",
    "dividends",
    "instance_weight",
    "persons_worked_for_employer",
    "weeks_worked",
)


def read_census(path, keep_weight=False):
    """Features and labels of a file of the set.

    Args:
        path: The file; gzipped if its name ends in `.gz`.
        keep_weight: bool. Whether the instance weight is a feature.

    Returns:
        Two dicts of arrays by column: the features, strings or float32, and
        the labels, 0 or 1.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        rows = [[v.strip() for v in line.split(",")] for line in file]
    if not rows or any(len(row) != len(COLUMNS) for row in rows):
        raise ValueError(f"a line must have {len(COLUMNS)} values")
    table = np.array(rows)
    columns = {name: table[:, i] for i, name in enumerate(COLUMNS)}
    labels = {
        "income": columns.pop("income") == "50000+.",
        "marital": columns.pop("marital_status") == "Never married",
    }
    if not keep_weight:
        del columns["instance_weight"]
    for name in NUMBERS:
        if name in columns:
            columns[name] = columns[name].astype("float32")
    return columns, {k: v.astype("float32") for k, v in labels.items()}


def split(columns, by_distinct_row, seed=0):
    """Row numbers of the parts: 60 % train, 20 % validate, 20 % test.

    Args:
        columns: Dict of arrays, the features.
        by_distinct_row: bool. Whether rows with the same features go to the
            same part. It is then the different rows that are split 60/20/20.
        seed: int. Of the split.

    Returns:
        A dict of arrays, and the number of different rows.
    """
    codes = [np.unique(v, return_inverse=True)[1] for v in columns.values()]
    _, group = np.unique(np.stack(codes, 1), axis=0, return_inverse=True)
    distinct = int(group.max()) + 1
    if not by_distinct_row:
        group = np.arange(len(group))
    place = np.random.default_rng(seed).permutation(group.max() + 1)[group]
    share = place / (group.max() + 1)
    parts = {
        "train": np.flatnonzero(share < 0.6),
        "validate": np.flatnonzero((share >= 0.6) & (share < 0.8)),
        "test": np.flatnonzero(share >= 0.8),
    }
    return parts, distinct
