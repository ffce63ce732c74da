"""`CondConv2D` beside one convolution of the same size.

    python -m benchmarks.convolution --backend torch

Forward is inference; forward with gradients is a training call with the
gradients of the images and all weights. Both are timed in turn.
"""

import numpy as np

from benchmarks import measure

# Height and width, channels, filters, kernel size, strides, groups.
SHAPES = {
    "pointwise": (14, 112, 672, 1, 1, 1),
    "3x3": (28, 32, 64, 3, 1, 1),
    "3x3, small images": (14, 128, 128, 3, 1, 1),
    "depthwise 5x5": (14, 672, 672, 5, 1, 672),
    "depthwise 3x3, strides 2": (28, 144, 144, 3, 2, 144),
}


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--xla", action="store_true", help="TensorFlow's XLA")
    arguments = parser.parse_args()
    measure.choose(arguments)
    figures, rows = {}, []
    for name, shape in SHAPES.items():
        figures[name] = compare(shape, arguments)
        measure.write(arguments, figures)
        own = [found["CondConv2D"] for found in figures[name].values()]
        rows.append(
            [
                name,
                *(f"{f['ratio']:.2f} ({f['ratio_of_best']:.2f})" for f in own),
                *(f"{1e3 * f['median_s']:.2f}" for f in own),
            ]
        )
    measure.print_table(
        [
            "convolution",
            "forward: ratio (of the best runs)",
            "with gradients",
            "ms",
            "ms",
        ],
        rows,
    )


def compare(shape, arguments):
    import keras

    from benchmarks import steps
    from keras_moe.layers import CondConv2D

    class InTraining(keras.layers.Layer):
        """A layer that takes `training`, which convolutions of Keras do not."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def call(self, inputs, training=None):
            return self.layer(inputs)

    size, channels, filters, kernel_size, strides, groups = shape
    options = {
        "kernel_size": kernel_size,
        "strides": strides,
        "padding": "same",
        "data_format": "channels_last",
    }
    if groups == 1:
        dense = keras.layers.Conv2D(filters, **options)
    else:
        dense = keras.layers.DepthwiseConv2D(**options)
    layers = {
        "dense": InTraining(dense),
        "CondConv2D": CondConv2D(
            filters, num_experts=arguments.experts, groups=groups, **options
        ),
    }
    x = np.random.default_rng(0).normal(
        size=(arguments.batch, size, size, channels)
    )
    figures = {}
    for kind, make in (
        ("forward", steps.forward_step),
        ("gradients", steps.gradient_step),
    ):
        functions = {
            name: make(layer, x, arguments.xla)
            for name, layer in layers.items()
        }
        times = measure.alternate(functions, arguments.seconds)
        figures[kind] = measure.summary(times, "dense")
    return figures


if __name__ == "__main__":
    main()
