"""Experts over many devices."""

from keras_moe.distribution.place_experts import Placement as Placement
from keras_moe.distribution.place_experts import place_experts as place_experts
