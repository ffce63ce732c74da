"""Layers that join routers, experts and losses."""

from keras_moe.layers.capacity import Capacity as Capacity
from keras_moe.layers.moe import MoE as MoE
from keras_moe.layers.soft_moe import SoftMoE as SoftMoE
