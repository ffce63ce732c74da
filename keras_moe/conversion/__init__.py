"""Functions that change existing models."""

from keras_moe.conversion.set_eval_top_k import set_eval_top_k as set_eval_top_k
