"""Experts and batches over many devices."""

from keras_moe.distribution.expert_parallel import (
    ExpertParallel as ExpertParallel,
)
from keras_moe.distribution.expert_parallel import initialize as initialize
from keras_moe.distribution.place_experts import Placement as Placement
from keras_moe.distribution.place_experts import place_experts as place_experts
from keras_moe.distribution.plan import Plan as Plan
from keras_moe.distribution.plan import plan as plan
from keras_moe.distribution.plan_cost import LayerPlan as LayerPlan
