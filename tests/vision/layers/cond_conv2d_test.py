"""`CondConv2D` against one convolution of Keras for each image."""

import os

import keras
import numpy as np
from absl.testing import parameterized
from keras import ops

import keras_moe
from keras_moe.layers import CondConv2D
from keras_moe.routers import DenseRouter
from keras_moe.routers import TopKRouter
from tests.test_case import TestCase

# Channels, filters, groups, kernel size, strides, dilation, padding.
KINDS = (
    ("pointwise", 4, 6, 1, 1, 1, 1, "valid"),
    ("pointwise_strides", 4, 6, 1, 1, 2, 1, "same"),
    ("same", 4, 6, 1, 3, 1, 1, "same"),
    ("same_even", 4, 6, 1, (2, 4), (1, 3), 1, "same"),
    ("dilated", 4, 6, 1, 3, 1, (2, 1), "valid"),
    ("symmetric", 4, 6, 1, 3, 2, 1, (1, 0)),
    ("groups", 4, 6, 2, 3, 1, 1, "same"),
    ("depthwise", 4, 4, 4, 3, 2, 1, "same"),
    ("depthwise_multiplied", 4, 8, 4, 3, 1, 2, 2),
    ("depthwise_uneven", 4, 4, 4, (3, 2), (2, 1), 1, "same"),
    ("strides_and_dilation", 4, 6, 1, 3, 2, 2, "same"),
    ("depthwise_strides_and_dilation", 4, 4, 4, 3, 2, 2, "same"),
)

WITH_GRADIENTS = ("same", "groups", "depthwise", "depthwise_uneven")


def convolved(images, kernel, strides, dilation, padding):
    """A NumPy loop over positions; images `(B, H, W, C)`, one kernel each."""
    pair = [(v, v) if isinstance(v, int) else v for v in (strides, dilation)]
    strides, dilation = pair
    size = kernel.shape[1:3]
    widths = []
    for axis in range(2):
        span = (size[axis] - 1) * dilation[axis] + 1
        length = images.shape[1 + axis]
        if padding == "same":
            outputs = -(-length // strides[axis])
            total = max((outputs - 1) * strides[axis] + span - length, 0)
            widths.append((total // 2, total - total // 2))
        elif padding == "valid":
            widths.append((0, 0))
        else:
            each = padding if isinstance(padding, int) else padding[axis]
            widths.append((each, each))
    images = np.pad(images, ((0, 0), *widths, (0, 0)))
    spans = [(n - 1) * d + 1 for n, d in zip(size, dilation, strict=True)]
    height, width = (
        (images.shape[1 + axis] - spans[axis]) // strides[axis] + 1
        for axis in range(2)
    )
    c, filters = kernel.shape[3:]
    y = np.zeros((len(images), height, width, filters))
    for f in range(filters):
        group = f // (filters // (images.shape[-1] // c))
        for i, j in np.ndindex(height, width):
            top, left = i * strides[0], j * strides[1]
            window = images[
                :,
                top : top + spans[0] : dilation[0],
                left : left + spans[1] : dilation[1],
                group * c : (group + 1) * c,
            ]
            y[:, i, j, f] = (window * kernel[..., f]).sum((1, 2, 3))
    return y


def layer_and_inputs(data_format="channels_last", **kwargs):
    rng = np.random.default_rng(0)
    kwargs = {"filters": 3, "kernel_size": 3, "num_experts": 2, **kwargs}
    layer = CondConv2D(data_format=data_format, **kwargs)
    x = rng.normal(size=(3, 6, 5, 4)).astype("float32")
    if data_format == "channels_first":
        x = x.transpose(0, 3, 1, 2)
    layer.build(x.shape)
    for v in layer.weights:
        v.assign(rng.normal(size=v.shape))
    return layer, x


class CondConv2DTest(TestCase):
    @parameterized.named_parameters(*KINDS)
    def test_numpy_loop(
        self, channels, filters, groups, size, strides, dilation, padding
    ):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, 7, 6, channels)).astype("float32")
        weights = rng.normal(size=(2, 3)).astype("float32")
        layer = CondConv2D(
            filters,
            size,
            3,
            strides=strides,
            padding=padding,
            dilation_rate=dilation,
            groups=groups,
            bias_initializer="random_normal",
            data_format="channels_last",
        )
        y = ops.convert_to_numpy(layer(x, routing_weights=weights))
        self.assertLen(layer.weights, 2)  # no router
        kernel, bias = (
            np.tensordot(weights, ops.convert_to_numpy(bank), 1)
            for bank in layer.weights
        )
        expected = convolved(x, kernel, strides, dilation, padding)
        expected += bias[:, None, None]
        self.assertAllClose(y, expected, atol=1e-5)
        self.assertEqual(layer.compute_output_shape(x.shape), y.shape)

    @parameterized.named_parameters(
        *(kind for kind in KINDS if kind[0] in WITH_GRADIENTS)
    )
    def test_gradients(
        self, channels, filters, groups, size, strides, dilation, padding
    ):
        # The outputs are linear in each of inputs, kernels and biases, so that
        # a step in any direction tells the gradient exactly.
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2, 7, 6, channels)).astype("float32")
        weights = rng.normal(size=(2, 3)).astype("float32")
        layer = CondConv2D(
            filters,
            size,
            3,
            strides=strides,
            padding=padding,
            dilation_rate=dilation,
            groups=groups,
            data_format="channels_last",
        )
        y = ops.convert_to_numpy(layer(x, routing_weights=weights))
        cotangent = rng.normal(size=y.shape).astype("float32")
        _, d_x, d_variables = self.outputs_and_gradients(
            layer, x, cotangent, routing_weights=ops.array(weights)
        )

        def change_of(step):
            new = ops.convert_to_numpy(layer(step, routing_weights=weights))
            return np.sum((new - y) * cotangent)

        step = rng.normal(size=x.shape).astype("float32")
        self.assertAllClose(change_of(x + step), np.sum(d_x * step), rtol=1e-4)
        for name in ("kernel", "bias"):
            variable = getattr(layer, name)
            before = ops.convert_to_numpy(variable)
            step = rng.normal(size=variable.shape).astype("float32")
            variable.assign(before + step)
            change = np.sum(d_variables[name] * step)
            self.assertAllClose(change_of(x), change, rtol=1e-4)
            variable.assign(before)

    def test_router(self):
        layer, x = layer_and_inputs()
        kernel, bias = (
            ops.convert_to_numpy(v)
            for v in (layer.router.kernel, layer.router.bias)
        )
        weights = 1 / (1 + np.exp(-(x.mean((1, 2)) @ kernel + bias)))
        self.assertAllClose(
            layer(x), layer(x, routing_weights=weights), atol=1e-5
        )

    def test_gradients_reach_the_router(self):
        layer, x = layer_and_inputs()
        _, _, found = self.outputs_and_gradients(layer, x)
        bias = ops.convert_to_numpy(layer.router.bias)
        sums = []
        for step in (-0.01, 0.01):
            layer.router.bias.assign(bias + [step, 0])
            sums.append(ops.convert_to_numpy(layer(x)).sum(dtype="float64"))
        slope = (sums[1] - sums[0]) / 0.02
        self.assertAllClose(found["router/bias"][0], slope, rtol=1e-2)

    def test_each_image_by_itself(self):
        layer, x = layer_and_inputs()
        together = ops.convert_to_numpy(layer(x))
        alone = ops.convert_to_numpy(layer(x[1:2]))
        self.assertAllClose(together[1:2], alone, atol=1e-5)

    @parameterized.named_parameters(
        ("product", {}), ("depthwise", {"filters": 4, "groups": 4})
    )
    def test_channels_first(self, kwargs):
        kwargs = {"padding": "same", "strides": 2, **kwargs}
        last, x = layer_and_inputs(**kwargs)
        first, x_first = layer_and_inputs("channels_first", **kwargs)
        y = ops.convert_to_numpy(last(x)).transpose(0, 3, 1, 2)
        self.assertAllClose(first(x_first), y, atol=1e-5)
        self.assertEqual(first.compute_output_shape(x_first.shape), y.shape)

    def test_other_routers(self):
        # Dynamic convolution, and the two best kernels.
        _, x = layer_and_inputs()
        for router, top_k in (
            (DenseRouter(3, temperature=30.0), 3),
            (TopKRouter(3, top_k=2), 2),
        ):
            layer, _ = layer_and_inputs(router=router, num_experts=None)
            self.assertEqual(layer.num_experts, 3)
            routing = router(x.mean((1, 2)))
            weights = np.zeros((3, 3), "float32")
            np.put_along_axis(
                weights,
                ops.convert_to_numpy(routing.expert_indices),
                ops.convert_to_numpy(routing.expert_weights),
                axis=1,
            )
            self.assertAllClose(weights.sum(1), np.ones(3))
            self.assertEqual((weights > 0).sum(), 3 * top_k)
            self.assertAllClose(
                layer(x), layer(x, routing_weights=weights), atol=1e-5
            )

    @parameterized.named_parameters(
        ("compiled", (6, 6), keras.config.backend() != "torch"),
        ("unknown_sizes", (None, None), "auto"),
    )
    def test_trains_and_saves(self, sizes, jit_compile):
        # Of unknown batch size, with one router for two of the layers.
        inputs = keras.Input((*sizes, 4))
        options = {"strides": 2, "padding": "same", "activation": "relu"}
        x = CondConv2D(
            4, 3, 2, data_format="channels_last", name="own", **options
        )(inputs)
        pooled = ops.mean(x, axis=(1, 2))
        weights = keras.layers.Dense(2, activation="sigmoid")(pooled)
        for groups in (1, 4):
            x = CondConv2D(
                4, 3, 2, groups=groups, data_format="channels_last", **options
            )(x, routing_weights=weights)
        model = keras.Model(inputs, ops.mean(x, axis=(1, 2)))
        rng = np.random.default_rng(0)
        x = rng.normal(size=(5, 6, 6, 4)).astype("float32")
        y = rng.normal(size=(5, 4)).astype("float32")
        model.compile(
            keras.optimizers.Adam(0.02),
            "mse",
            jit_compile=jit_compile,
        )
        before = [ops.convert_to_numpy(v) for v in model.trainable_variables]
        history = model.fit(x, y, batch_size=3, epochs=3, verbose=0)
        losses = history.history["loss"]
        self.assertLess(losses[-1], losses[0])
        for old, variable in zip(
            before, model.trainable_variables, strict=True
        ):
            self.assertNotAllClose(old, variable, msg=variable.path)
        path = os.path.join(self.get_temp_dir(), "model.keras")
        model.save(path)
        again = keras.models.load_model(path)
        self.assertLen(again.get_layer("own").weights, 4)
        self.assertAllClose(
            again.predict(x, batch_size=2, verbose=0),
            model.predict(x, batch_size=5, verbose=0),
            atol=1e-5,
        )

    @parameterized.named_parameters(
        (f"{dtype}_{groups}", dtype, groups)
        for dtype in ("mixed_bfloat16", "mixed_float16")
        for groups in (1, 4)
    )
    def test_mixed_precision(self, dtype, groups):
        kwargs = {"filters": 4, "groups": groups}
        exact, x = layer_and_inputs(**kwargs)
        layer, _ = layer_and_inputs(dtype=dtype, **kwargs)
        y = layer(x)
        self.assertEqual(
            keras.backend.standardize_dtype(y.dtype), layer.compute_dtype
        )
        self.assertEqual(layer.router.compute_dtype, "float32")
        expected = ops.convert_to_numpy(exact(x))
        self.assert_relative(ops.cast(y, "float32"), expected, 3e-2)

    def test_float64(self):
        if keras.config.backend() == "jax":
            self.skipTest("JAX has float64 only if it is switched on.")
        exact, x = layer_and_inputs()
        layer, _ = layer_and_inputs(dtype="float64")
        y = layer(x)
        self.assertEqual(keras.backend.standardize_dtype(y.dtype), "float64")
        self.assertAllClose(y, exact(x), atol=1e-5)

    def test_mean_of_large_images_in_half_precision(self):
        # The sum over an image would be infinite in float16.
        layer, _ = layer_and_inputs(dtype="mixed_float16", kernel_size=1)
        x = np.full((1, 64, 64, 4), 100.0, "float32")
        layer.router.kernel.assign(np.zeros((4, 2)))
        layer.router.bias.assign([-50.0, -50.0])
        self.assertAllClose(layer(x), np.zeros((1, 64, 64, 3)), atol=1e-5)

    def test_experts_are_drawn_separately(self):
        layer = CondConv2D(
            64,
            3,
            2,
            kernel_initializer=keras.initializers.HeNormal(seed=1),
            kernel_regularizer=keras.regularizers.L2(1.0),
            kernel_constraint=keras.constraints.MaxNorm(0.5, axis=(0, 1, 2)),
        )
        shape = (None, 8, 8, 32)
        if layer.data_format == "channels_first":
            shape = (None, 32, 8, 8)
        layer.build(shape)
        kernel = ops.convert_to_numpy(layer.kernel)
        self.assertNotAllClose(kernel[0], kernel[1])
        # Of one kernel, not of the bank.
        self.assertAllClose(kernel.std(), np.sqrt(2 / (9 * 32)), rtol=0.02)
        self.assertAllClose(layer.losses[0], np.sum(kernel**2), rtol=1e-4)
        layer.kernel.assign(layer.kernel.constraint(layer.kernel))
        kernel = ops.convert_to_numpy(layer.kernel)
        norms = np.sqrt(np.square(kernel).sum((1, 2, 3)))
        self.assertAllClose(norms, np.full((2, 64), 0.5), atol=1e-4)

    @parameterized.named_parameters(
        ("filters", {"filters": 0}, "`filters` must be an int of at least 1"),
        ("kernel_size", {"kernel_size": (3, 3, 3)}, "`kernel_size` must be"),
        ("strides", {"strides": 0}, "`strides` must be an int of at least 1"),
        ("padding", {"padding": "causal"}, "`padding` must be 'valid', 'same'"),
        ("negative_padding", {"padding": (1, -1)}, "`padding` must be"),
        ("dilation_rate", {"dilation_rate": "2"}, "`dilation_rate` must be"),
        ("groups", {"groups": 2}, "`groups` must divide `filters`"),
        ("data_format", {"data_format": "NHWC"}, "`data_format` must be one"),
        ("use_bias", {"use_bias": 1}, "`use_bias` must be True or False"),
        ("num_experts", {"num_experts": 0}, "`num_experts` must be an int"),
        ("router", {"router": 3}, "`router` must be a name or a layer"),
        (
            "lookahead",
            {"router": keras_moe.routers.ExpertChoiceRouter(4)},
            "`router` must be .* by itself",
        ),
        (
            "agreement",
            {"router": DenseRouter(3), "num_experts": 4},
            "`num_experts` must be the number of the router",
        ),
        (
            "kernel_initializer",
            {"kernel_initializer": "unheard of"},
            "`kernel_initializer` must be",
        ),
    )
    def test_arguments(self, kwargs, message):
        with self.assertRaisesRegex(ValueError, f"(?s){message}.*Received"):
            CondConv2D(**{"filters": 3, "kernel_size": 3, **kwargs})

    def test_inputs(self):
        def layer(**kwargs):
            kwargs = {"filters": 4, "kernel_size": 3, **kwargs}
            return CondConv2D(data_format="channels_last", **kwargs)

        images = np.ones((2, 8, 8, 3), "float32")
        for make, message in (
            (lambda: layer().build((None, 8, 3)), "rank 4"),
            (lambda: layer().build((None, 8, 8, None)), "static number"),
            (lambda: layer(groups=2).build((None, 8, 8, 3)), "`groups` div"),
            (lambda: layer().build((None, 2, 8, 3)), "as large as the kernels"),
            (
                lambda: layer()(images, routing_weights=np.ones((2, 3))),
                "`routing_weights` must be of shape.*num_experts=4",
            ),
        ):
            with self.assertRaisesRegex(ValueError, message):
                make()
        shared = layer()
        shared(images, routing_weights=np.ones((2, 4), "float32"))
        with self.assertRaisesRegex(ValueError, "`routing_weights` must be g"):
            shared(images)
