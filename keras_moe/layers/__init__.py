"""Layers that join routers, experts and losses."""

from keras_moe.layers.moe import MoE as MoE
