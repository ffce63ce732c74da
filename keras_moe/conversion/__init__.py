"""Functions that change models which are there already."""

from keras_moe.conversion.set_eval_top_k import set_eval_top_k as set_eval_top_k
