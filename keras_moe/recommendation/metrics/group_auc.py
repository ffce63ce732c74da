import math

import numpy as np

from keras_moe.checks import check_one_of

WEIGHTINGS = ("size", "positives", "equal")


def group_auc(y_true, y_pred, groups, weighting="size"):
    """Mean of the AUC within each group (GAUC), in NumPy.

    A recommender orders the items of one user. The AUC over all examples also
    rewards knowing which users click more; the grouped AUC does not.

    ```
    gauc = sum over groups of weight * auc / sum of weight
    ```

    Groups with only positives or only negatives have no AUC and are left out,
    and so are examples whose label is NaN. Equal predictions count half.

    Args:
        y_true: Array of labels 0 and 1, `(N,)` or `(N, 1)`; may hold NaNs.
        y_pred: Array of predictions of the same size.
        groups: Array of `N` group ids, numbers or strings: the users.
        weighting: `"size"` (number of examples), `"positives"` (number of
            positives) or `"equal"`. Defaults to `"size"`.

    Returns:
        A float; NaN if no group has an AUC, or a prediction is NaN.

    Raises:
        ValueError: If the sizes differ, labels or predictions are not numbers,
            a label is not 0, 1 or NaN, `groups` mixes kinds that cannot be
            sorted, or `weighting` is unknown.

    Example:

    >>> float(keras_moe.metrics.group_auc(
    ...     [1, 0, 1, 0, 1], [0.9, 0.8, 0.2, 0.1, 0.5], list("aabbc")))
    1.0

    Reference:

    - [Zhu et al., 2017](https://arxiv.org/abs/1703.02091), section 5.1
    - [Zhou et al., 2018](https://arxiv.org/abs/1706.06978), equation 4
    """
    check_one_of("weighting", weighting, WEIGHTINGS)
    y_true = _as_floats("y_true", y_true)
    y_pred = _as_floats("y_pred", y_pred)
    groups = np.asarray(groups).reshape(-1)
    if not y_true.size == y_pred.size == groups.size:
        raise ValueError(
            "`y_true`, `y_pred` and `groups` must be of one size. Received: "
            f"{y_true.size}, {y_pred.size} and {groups.size}"
        )
    known = ~np.isnan(y_true)
    y_true, y_pred, groups = y_true[known], y_pred[known], groups[known]
    if not np.isin(y_true, (0.0, 1.0)).all():
        raise ValueError(
            "`y_true` must be made of 0, 1 and NaN. Received: "
            f"{y_true[~np.isin(y_true, (0.0, 1.0))][:5]}"
        )
    if not y_true.size or np.isnan(y_pred).any():
        return math.nan
    try:
        names, groups = np.unique(groups, return_inverse=True)
    except TypeError as error:
        raise ValueError(
            "`groups` must be numbers or strings, without `None`. "
            f"Received: {groups[:5]}"
        ) from error
    ranks = _ranks_in_groups(groups, y_pred)
    size = np.bincount(groups, minlength=names.size)
    positives = np.bincount(groups, y_true, minlength=names.size)
    negatives = size - positives
    rank_sums = np.bincount(groups, ranks * y_true, minlength=names.size)
    has_both = (positives > 0) & (negatives > 0)
    if not has_both.any():
        return math.nan
    # Mann-Whitney: the rank of a positive counts the examples below it.
    wins = rank_sums - positives * (positives + 1) / 2
    auc = wins[has_both] / (positives * negatives)[has_both]
    weight = {
        "size": size,
        "positives": positives,
        "equal": np.ones(names.size),
    }[weighting][has_both]
    return float(np.sum(weight * auc) / np.sum(weight))


def _as_floats(name, values):
    try:
        return np.asarray(values, "float64").reshape(-1)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{name}` must be an array of numbers. Received: {name}={values!r}"
        ) from error


def _ranks_in_groups(groups, values):
    """The rank of each value within its group from 1; ties get their mean."""
    order = np.lexsort((values, groups))
    groups, values = groups[order], values[order]
    is_new_group = np.r_[True, groups[1:] != groups[:-1]]
    is_new_value = is_new_group | np.r_[True, values[1:] != values[:-1]]
    starts = np.flatnonzero(is_new_value)
    stops = np.r_[starts[1:], values.size]
    mean_place = (starts + stops + 1) / 2  # Places count from 1.
    place = np.repeat(mean_place, stops - starts)
    group_start = np.flatnonzero(is_new_group)[np.cumsum(is_new_group) - 1]
    ranks = np.empty(values.size)
    ranks[order] = place - group_start
    return ranks
