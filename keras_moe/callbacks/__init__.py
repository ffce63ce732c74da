"""Callbacks for `fit`."""

from keras_moe.recommendation.tasks.combine_logs import (
    CombineLogs as CombineLogs,
)
