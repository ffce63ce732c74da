"""Experts and batches over many devices."""

from keras_moe.distribution.expert_parallel import (
    ExpertParallel as ExpertParallel,
)
