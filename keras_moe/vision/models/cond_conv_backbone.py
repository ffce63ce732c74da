import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.moe.part_arguments import default_name
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.ops import activations
from keras_moe.vision.layers.inverted_residual_block import PADDINGS
from keras_moe.vision.layers.inverted_residual_block import (
    InvertedResidualBlock,
)
from keras_moe.vision.layers.inverted_residual_block import padded
from keras_moe.vision.layers.patch_embedding import as_data_format
from keras_moe.vision.models.block_specs import as_block_specs
from keras_moe.vision.models.cond_conv_presets import COND_CONV
from keras_moe.vision.models.cond_conv_presets import EFFICIENTNET_B0
from keras_moe.vision.models.image_backbone import ImageBackbone
from keras_moe.vision.models.image_backbone import as_dtype
from keras_moe.vision.models.image_backbone import as_image_shape
from keras_moe.vision.models.stages import in_format


@keras.saving.register_keras_serializable("keras_moe")
class CondConvBackbone(ImageBackbone):
    """An EfficientNet that mixes kernels for each image in some of its blocks.

    ```
    x = activation(norm(conv(images)))               3 x 3, strides of 2
    for each block:
        x = InvertedResidualBlock(x)
    y = activation(norm(conv(x)))                    1 x 1
    ```

    In a block with experts one router weighs the kernels of all convolutions
    by the mean of what the block reads. In inference each image is on its own;
    in training the batch normalizations join the images of a batch.

    Args:
        image_shape: Three ints, in the order of `data_format`.
        stages: list of strings, or of lists of them, which say what blocks
            there are: `"ir_r2_k3_s2_e6_c24_se0.25_cc4"` are 2 (`r`) inverted
            residual blocks with a kernel of 3 (`k`), the first with strides of
            2 (`s`), an expansion of 6 (`e`), 24 channels (`c`), squeeze and
            excitation by a quarter (`se`) and 4 experts (`cc`). `"ds"`, for
            depthwise separable, has no expansion; `se` and `cc` may be left
            out. Defaults to those of EfficientNet-B0 with 4 experts in the last
            three stages.
        stem_filters: int. Channels of the first convolution. Defaults to `32`.
        head_filters: int. Channels that come out. Defaults to `1280`.
        router: What weighs the experts, as for `keras_moe.layers.CondConv2D`;
            each block has its own copy. Defaults to `None`, a sigmoid.
        activation: Activation of all layers. Defaults to `"silu"`.
        padding: `"same"` as in Keras and TensorFlow, or `"symmetric"` as in
            models of PyTorch. Defaults to `"same"`.
        batch_norm_epsilon: float. Defaults to `1e-3`.
        batch_norm_momentum: float. Defaults to `0.99`.
        drop_path: float. Share of images that skip the last block; it grows
            from 0 in the first. Defaults to `0.0`.
        data_format, dtype: As for `keras_moe.models.VMoEBackbone`.
        **kwargs: `name` and `trainable`.

    Input shape:
        `(batch, *image_shape)`

    Output shape:
        `(batch, height, width, head_filters)`, or with `"channels_first"`
        `(batch, head_filters, height, width)`.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> backbone = keras_moe.models.CondConvBackbone(
    ...     image_shape=(32, 32, 3), stem_filters=8, head_filters=16,
    ...     stages=["ds_r1_k3_s1_c8", "ir_r2_k3_s2_e2_c12_cc4"],
    ... )
    >>> backbone.moe_blocks
    [1, 2]
    >>> tuple(backbone(np.zeros((2, 32, 32, 3))).shape)
    (2, 8, 8, 16)

    Reference:

    - [Yang et al., 2019](https://arxiv.org/abs/1904.04971), section 4
    - [Tan & Le, 2019](https://arxiv.org/abs/1905.11946), table 1
    """

    presets = COND_CONV

    def __init__(
        self,
        image_shape,
        stages=EFFICIENTNET_B0,
        stem_filters=32,
        head_filters=1280,
        router=None,
        activation="silu",
        padding="same",
        batch_norm_epsilon=1e-3,
        batch_norm_momentum=0.99,
        drop_path=0.0,
        data_format=None,
        dtype=None,
        *,
        name=None,
        **kwargs,
    ):
        a = {
            key: value
            for key, value in locals().items()
            if key not in ("self", "name", "kwargs", "__class__")
        }
        specs = as_block_specs(stages)
        for key in ("stem_filters", "head_filters"):
            check_int(key, a[key], 1)
        check_one_of("padding", padding, PADDINGS)
        check_positive("batch_norm_epsilon", batch_norm_epsilon)
        check_rate("batch_norm_momentum", batch_norm_momentum)
        check_rate("drop_path", drop_path)
        activation = as_keras_object("activation", activations.get, activation)
        a["stages"] = [
            list(stage) if isinstance(stage, tuple) else stage
            for stage in stages
        ]
        a["activation"] = activations.serialize(activation)
        dtype = a["dtype"] = as_dtype(dtype)
        a["data_format"] = as_data_format(data_format)
        if isinstance(router, keras.layers.Layer):
            a["router"] = router = serialize_part(router)

        def conv(x, filters, size, strides, name):
            x = padded(x, size, strides, padding)
            x = keras.layers.Conv2D(
                filters,
                size,
                strides=strides,
                use_bias=False,
                data_format="channels_last",
                dtype=dtype,
                name=name,
            )(x)
            x = keras.layers.BatchNormalization(
                epsilon=batch_norm_epsilon,
                momentum=batch_norm_momentum,
                dtype=dtype,
                name=f"{name}_norm",
            )(x)
            return activation(x)

        images = keras.Input(as_image_shape(image_shape), name="images")
        x = images
        if a["data_format"] == "channels_first":
            x = ops.transpose(x, (0, 2, 3, 1))
        x = conv(x, stem_filters, 3, 2, "stem")
        blocks = [
            (spec, spec.strides if repeat == 0 else 1)
            for spec in specs
            for repeat in range(spec.repeats)
        ]
        for i, (spec, strides) in enumerate(blocks):
            x = InvertedResidualBlock(
                spec.filters,
                spec.kernel_size,
                strides,
                spec.expansion,
                spec.squeeze_ratio,
                spec.num_experts,
                router if spec.num_experts else None,
                activation,
                padding,
                batch_norm_epsilon,
                batch_norm_momentum,
                # Deeper blocks are left out more often.
                drop_path * i / max(len(blocks) - 1, 1),
                dtype=dtype,
                name=f"block_{i}",
            )(x)
        x = conv(x, head_filters, 1, 1, "head")
        super().__init__(
            a,
            images,
            in_format(x, a["data_format"]),
            name=name or default_name("cond_conv_backbone"),
            **kwargs,
        )

    @property
    def moe_blocks(self):
        return [
            i
            for i in range(self.num_blocks)
            if self.block(i).num_experts is not None
        ]
