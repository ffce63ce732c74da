"""Convolutions of images with a kernel for each."""

import torch


def window(images, starts, spans, strides):
    rows, columns = (
        slice(start, start + span, stride)
        for start, span, stride in zip(starts, spans, strides, strict=True)
    )
    return images[:, rows, columns]


def depthwise_conv(images, kernels, strides, dilation_rate):
    batch, height, width, channels = images.shape
    filters = kernels.shape[-1]
    x = images.permute(0, 3, 1, 2).reshape(1, -1, height, width)
    weight = kernels.permute(0, 3, 1, 2).flatten(0, 1)[:, None]
    y = torch.nn.functional.conv2d(
        x,
        weight,
        stride=strides,
        dilation=dilation_rate,
        groups=batch * channels,
    )
    y = y.reshape(batch, filters, *y.shape[2:])
    return y.permute(0, 2, 3, 1)
