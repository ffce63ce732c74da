"""Convolutions of images with a kernel for each."""

import tensorflow as tf

from keras_moe.backend.tensorflow.groups import compiles_with_xla


def window(images, starts, spans, strides):
    # The gradient of a slice is a few times as fast as that of indexing.
    part = tf.slice(images, [0, *starts, 0], [-1, *spans, -1])
    if max(strides) == 1:
        return part
    return part[:, :: strides[0], :: strides[1]]


def depthwise_conv(images, kernels, strides, dilation_rate):
    takes = strides[0] == strides[1] and 1 in (strides[0], max(dilation_rate))
    # XLA's loops over groups are slow, but it fuses products and sums.
    if compiles_with_xla() or not takes:
        return None
    batch, height, width, channels = tf.unstack(tf.shape(images))
    size, filters = kernels.shape[1:3], kernels.shape[3]
    x = tf.transpose(images, (1, 2, 0, 3))
    x = tf.reshape(x, (1, height, width, batch * channels))
    weights = tf.transpose(kernels, (1, 2, 0, 3))
    weights = tf.reshape(
        weights, (*size, batch * channels, filters // images.shape[3])
    )
    y = tf.nn.depthwise_conv2d(
        x, weights, (1, *strides, 1), "VALID", dilations=dilation_rate
    )
    height, width = tf.unstack(tf.shape(y)[1:3])
    y = tf.reshape(y, (height, width, batch, filters))
    return tf.transpose(y, (2, 0, 1, 3))
