"""Convolutions of images with a kernel for each."""


def window(images, starts, spans, strides):
    rows, columns = (
        slice(start, start + span, stride)
        for start, span, stride in zip(starts, spans, strides, strict=True)
    )
    return images[:, rows, columns]


def depthwise_conv(images, kernels, strides, dilation_rate):
    # XLA's loops over groups are slow, but it fuses products and sums.
    return None
