"""Callbacks for `fit`."""

from keras_moe.callbacks.combine_logs import CombineLogs as CombineLogs
