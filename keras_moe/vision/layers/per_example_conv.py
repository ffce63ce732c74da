"""A 2D convolution with a kernel of its own for each example.

In the comments, H and W are the sizes of the outputs, S is the number of
positions of a kernel, C and F are the channels of inputs and outputs, c and f
those of one group.
"""

from keras import ops

from keras_moe import backend
from keras_moe.checks import is_int


def as_padding(padding):
    """`"valid"`, `"same"`, or a tuple of two ints."""
    pair = (padding, padding) if is_int(padding) else padding
    if pair in ("valid", "same"):
        return pair
    if (
        not isinstance(pair, (list, tuple))
        or len(pair) != 2
        or not all(is_int(width) and width >= 0 for width in pair)
    ):
        raise ValueError(
            "`padding` must be 'valid', 'same', or an int of at least 0 or a "
            f"pair of such. Received: padding={padding!r}"
        )
    return tuple(pair)


def output_sizes(sizes, kernel_size, strides, padding, dilation_rate):
    """Height and width of the outputs, from those of images; `None` stays."""
    found = []
    for axis, size in enumerate(sizes):
        if size is not None:
            if padding == "same":
                size += strides[axis] - 1
            else:
                more = 0 if padding == "valid" else 2 * padding[axis]
                reach = (kernel_size[axis] - 1) * dilation_rate[axis]
                size += more - reach + strides[axis] - 1
            size //= strides[axis]
            if size < 1:
                raise ValueError(
                    "The images must be at least as large as the kernels. "
                    f"Received: height and width {tuple(sizes)}, "
                    f"kernel_size={kernel_size}, padding={padding!r}, "
                    f"dilation_rate={dilation_rate}"
                )
        found.append(size)
    return found


def pad_images(images, kernel_size, strides, padding, dilation_rate):
    """Zeros around the images `(B, height, width, C)`.

    Args:
        images: `(B, height, width, C)`.
        kernel_size, strides, dilation_rate: pairs of ints.
        padding: `"valid"`, `"same"` as in Keras, where the lower and right
            side get the odd row, or a pair of ints, for both sides each.

    Returns:
        A larger tensor, or `images`.
    """
    if padding == "valid":
        return images
    widths = []
    for axis in range(2):
        if padding != "same":
            widths.append((padding[axis], padding[axis]))
            continue
        reach = (kernel_size[axis] - 1) * dilation_rate[axis]
        size, stride = ops.shape(images)[1 + axis], strides[axis]
        if stride == 1:
            total = reach
        else:
            total = reach + 1 - stride + -size % stride
            positive = max if isinstance(size, int) else ops.maximum
            total = positive(total, 0)
        widths.append((total // 2, total - total // 2))
    if all(isinstance(n, int) and n == 0 for pair in widths for n in pair):
        return images
    return ops.pad(images, ((0, 0), *widths, (0, 0)))


def per_example_conv(images, kernels, strides, dilation_rate):
    """Convolves each image with its own kernel, without padding.

    Args:
        images: `(B, height, width, C)`.
        kernels: `(B, kernel height, kernel width, C / groups, F)`.
        strides, dilation_rate: pairs of ints.

    Returns:
        `(B, H, W, F)`.
    """
    if kernels.shape[3] > 1:
        return _by_product(images, kernels, strides, dilation_rate)
    y = backend.depthwise_conv(
        images, kernels[:, :, :, 0], strides, dilation_rate
    )
    if y is None:
        y = _by_position(images, kernels, strides, dilation_rate)
    return y


def _positions(images, kernel_size, strides, dilation_rate):
    """What each position of the kernel reads, `(B, H, W, C)` each."""
    reach = [
        (size - 1) * dilation
        for size, dilation in zip(kernel_size, dilation_rate, strict=True)
    ]
    spans = [ops.shape(images)[1 + axis] - reach[axis] for axis in range(2)]
    return [
        backend.window(
            images,
            (row * dilation_rate[0], column * dilation_rate[1]),
            spans,
            strides,
        )
        for row in range(kernel_size[0])
        for column in range(kernel_size[1])
    ]


def _by_product(images, kernels, strides, dilation_rate):
    """One product of matrices for each example and group."""
    size, (c, filters) = kernels.shape[1:3], kernels.shape[3:]
    count, groups = size[0] * size[1], images.shape[-1] // c
    parts = _positions(images, size, strides, dilation_rate)
    batch, height, width, _ = ops.shape(parts[0])
    if groups == 1:
        x = parts[0] if count == 1 else ops.concatenate(parts, axis=-1)
        x = ops.reshape(x, (batch, height * width, count * c))
        kernels = ops.reshape(kernels, (-1, count * c, filters))
        # On torch `ops.matmul` would make float32 of float64.
        y = ops.einsum("bnk,bkf->bnf", x, kernels)
    else:
        x = ops.stack(parts, axis=3)  # (B, H, W, S, C)
        x = ops.reshape(x, (batch, height * width, count, groups, c))
        shape = (-1, count, c, groups, filters // groups)
        y = ops.einsum("bnsgc,bscgf->bngf", x, ops.reshape(kernels, shape))
    return ops.reshape(y, (batch, height, width, filters))


def _by_position(images, kernels, strides, dilation_rate):
    """Depthwise: a product for each position of the kernel."""
    size, filters = kernels.shape[1:3], kernels.shape[4]
    channels = images.shape[-1]
    parts = _positions(images, size, strides, dilation_rate)
    shape = (-1, size[0] * size[1], 1, 1, channels, filters // channels)
    weights = ops.reshape(kernels, shape)
    y = sum(
        ops.expand_dims(part, -1) * weights[:, position]
        for position, part in enumerate(parts)
    )  # (B, H, W, C, f)
    batch, height, width = ops.shape(y)[:3]
    return ops.reshape(y, (batch, height, width, filters))
