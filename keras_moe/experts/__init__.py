"""Experts: Keras layers that compute rows grouped by expert."""

from keras_moe.experts.constant_experts import (
    ConstantExperts as ConstantExperts,
)
from keras_moe.experts.copy_experts import CopyExperts as CopyExperts
from keras_moe.experts.experts import Experts as Experts
from keras_moe.experts.glu_experts import GLUExperts as GLUExperts
from keras_moe.experts.layer_experts import LayerExperts as LayerExperts
from keras_moe.experts.low_rank_experts import LowRankExperts as LowRankExperts
from keras_moe.experts.mixed_experts import MixedExperts as MixedExperts
from keras_moe.experts.mlp_experts import MLPExperts as MLPExperts
from keras_moe.experts.named_experts import get as get
from keras_moe.experts.zero_experts import ZeroExperts as ZeroExperts
from keras_moe.ops.activations import Swish as Swish
