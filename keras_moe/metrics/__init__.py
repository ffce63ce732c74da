"""Metrics of recommendation and of tasks with missing labels."""

from keras_moe.recommendation.metrics.binary_auc import BinaryAUC as BinaryAUC
from keras_moe.recommendation.metrics.calibration import (
    Calibration as Calibration,
)
from keras_moe.recommendation.metrics.group_auc import group_auc as group_auc
from keras_moe.recommendation.metrics.masked import Masked as Masked
from keras_moe.recommendation.metrics.normalized_entropy import (
    NormalizedEntropy as NormalizedEntropy,
)
