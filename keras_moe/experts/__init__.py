"""Experts: Keras layers from rows grouped by expert to rows."""

from keras_moe.experts.experts import Experts as Experts
from keras_moe.experts.glu_experts import GLUExperts as GLUExperts
from keras_moe.experts.mlp_experts import MLPExperts as MLPExperts
from keras_moe.experts.named import get as get
