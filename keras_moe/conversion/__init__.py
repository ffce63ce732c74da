"""Functions that change existing models."""

from keras_moe.conversion.resize_positions import (
    resize_positions as resize_positions,
)
from keras_moe.conversion.set_eval_top_k import set_eval_top_k as set_eval_top_k
from keras_moe.conversion.upcycle import upcycle as upcycle
from keras_moe.conversion.upcycled import upcycled_class as upcycled_class
