"""Mixture-of-Experts for Keras 3 on TensorFlow, JAX and PyTorch."""

from keras_moe import callbacks as callbacks
from keras_moe import conversion as conversion
from keras_moe import dispatch as dispatch
from keras_moe import distribution as distribution
from keras_moe import experts as experts
from keras_moe import layers as layers
from keras_moe import losses as losses
from keras_moe import metrics as metrics
from keras_moe import models as models
from keras_moe import ops as ops
from keras_moe import routers as routers
from keras_moe.version import __version__ as __version__
