import keras

from keras_moe.checks import as_units
from keras_moe.checks import check_rate
from keras_moe.moe.part_arguments import default_name
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.layers.conv_next_block import ConvNeXtBlock
from keras_moe.vision.layers.patch_embedding import PatchEmbedding
from keras_moe.vision.models.dense_presets import CONVNEXT
from keras_moe.vision.models.image_backbone import ImageBackbone
from keras_moe.vision.models.image_backbone import as_dtype
from keras_moe.vision.models.image_backbone import as_image_shape
from keras_moe.vision.models.moe_blocks import moe_block_indices
from keras_moe.vision.models.moe_blocks import odd_in_stages
from keras_moe.vision.models.stages import check_depths
from keras_moe.vision.models.stages import check_mlp_ratio
from keras_moe.vision.models.stages import feature_map
from keras_moe.vision.models.stages import halved
from keras_moe.vision.models.stages import in_format
from keras_moe.vision.models.stages import numbered_blocks
from keras_moe.vision.models.vmoe_layers import block_arguments
from keras_moe.vision.models.vmoe_layers import check_no_context
from keras_moe.vision.models.vmoe_layers import moe_of_blocks
from keras_moe.vision.models.vmoe_layers import split_moe_arguments


@keras.saving.register_keras_serializable("keras_moe")
class ConvNeXtMoEBackbone(ImageBackbone):
    """A ConvNeXt with experts in some of its blocks.

    ```
    x = layer_norm(patches of the images @ kernel + bias)
    for each stage, but for the first after conv(layer_norm(x)) of stride 2:
        for each block:
            x = x + scale * MoE(layer_norm(depthwise_conv(x)))
                                                or a dense feed-forward
    y = x
    ```

    The experts are the two pointwise convolutions of a block, and each position
    of the feature map goes to its own. A `keras_moe.models.MoEImageClassifier`
    normalizes the mean of the feature map.

    Only in training, the losses that balance the experts are added to the
    model's loss, and choices beyond the capacity are dropped. In inference each
    image is on its own, unless `eval_capacity_factor` is given or the router
    `looks_ahead`.

    Args:
        image_shape: Three ints, in the order of `data_format`.
        patch_size: int, or two; must divide the images. Defaults to `4`.
        depths: list of ints. Blocks of each stage. Defaults to `(3, 3, 9, 3)`.
        hidden_dims: list of ints. Channels of each stage. Defaults to
            `(96, 192, 384, 768)`.
        kernel_size: int. Rows and columns of the depthwise convolutions.
            Defaults to `7`.
        mlp_ratio: float. Width of the hidden layer of experts and dense
            feed-forwards, by that of the stage. Defaults to `4.0`.
        num_experts: int, or a list with one for each block with experts.
            Defaults to `8`.
        moe_layers: Which blocks have experts, counted from 0 through all
            stages: `"every_2"`, `"last_n"` the last n of those that are odd in
            their stage, or a list of ints; an empty one gives the dense model.
            Defaults to `"last_2"`.
        activation: Activation of experts and dense feed-forwards. Defaults to
            `"gelu"`.
        layer_scale: float, or `None` for no scale of the blocks. Defaults to
            `1e-6`.
        drop_path: float. Share of images that skip the last block; it grows
            from 0 in the first. Defaults to `0.0`.
        layer_norm_epsilon: float. Defaults to `1e-6`.
        data_format, dtype: As for `keras_moe.models.VMoEBackbone`.
        **kwargs: `name`, `trainable`, and what `VMoEBackbone` has for its
            experts: `router`, `top_k`, `router_noise`, `capacity_factor`,
            `eval_capacity_factor`, `capacity_multiple_of`, `drop_policy`,
            `group_size`, `route_per`, weights of losses, `losses`,
            `num_shared_experts`, `expert_dropout`, with the same defaults;
            besides, `normalize_weights` as for `keras_moe.routers.TopKRouter`.

    Input shape:
        `(batch, *image_shape)`

    Output shape:
        `(batch, height, width, channels)`, or with `"channels_first"`
        `(batch, channels, height, width)`: the feature map of the last stage.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> backbone = keras_moe.models.ConvNeXtMoEBackbone(
    ...     image_shape=(32, 32, 3), depths=(2, 2), hidden_dims=(8, 16),
    ...     kernel_size=3, num_experts=4,
    ... )
    >>> backbone.moe_blocks
    [1, 3]
    >>> tuple(backbone(np.zeros((2, 32, 32, 3))).shape)
    (2, 4, 4, 16)

    Reference:

    - [Liu et al., 2022](https://arxiv.org/abs/2201.03545), section 2
    - [Videau et al., 2024](https://arxiv.org/abs/2411.18322) (where experts
      help)
    """

    presets = CONVNEXT

    def __init__(
        self,
        image_shape,
        patch_size=4,
        depths=(3, 3, 9, 3),
        hidden_dims=(96, 192, 384, 768),
        kernel_size=7,
        mlp_ratio=4.0,
        num_experts=8,
        moe_layers="last_2",
        activation="gelu",
        layer_scale=1e-6,
        drop_path=0.0,
        layer_norm_epsilon=1e-6,
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
        of_moe, kwargs = split_moe_arguments(kwargs)
        a |= of_moe
        dtype = a["dtype"] = as_dtype(dtype)
        check_depths(depths)
        dims = as_units("hidden_dims", hidden_dims)
        if len(dims) != len(depths):
            raise ValueError(
                "`hidden_dims` must have a width for each stage of `depths`. "
                f"Received: hidden_dims={hidden_dims}, depths={depths}"
            )
        check_mlp_ratio(mlp_ratio, min(dims))
        check_rate("drop_path", drop_path)
        where = moe_block_indices(
            moe_layers, sum(depths), sum(odd_in_stages(depths), [])
        )
        around = block_arguments(a)
        blocks = numbered_blocks(depths)
        widths = [int(dims[stage] * mlp_ratio) for stage, _ in blocks]
        layers = moe_of_blocks(
            {**a, "mlp_dim": [widths[i] for i in where]}, where
        )
        check_no_context(layers)
        images = keras.Input(as_image_shape(image_shape), name="images")
        embedding = PatchEmbedding(
            dims[0],
            patch_size,
            positions=None,
            data_format=data_format,
            layer_norm_epsilon=layer_norm_epsilon,
            dtype=dtype,
            name="patch_embedding",
        )
        x = embedding(images)
        a["data_format"] = embedding.data_format
        x = feature_map(x, embedding.grid)
        for i, (stage, number) in enumerate(blocks):
            if stage and not number:
                x = halved(
                    x,
                    dims[stage],
                    layer_norm_epsilon,
                    dtype,
                    f"downsampling_{stage}",
                )
            feed_forward = layers.get(i) or VisionMLP(
                widths[i], activation, dtype=dtype, name="mlp"
            )
            x = ConvNeXtBlock(
                feed_forward,
                kernel_size,
                layer_scale,
                layer_norm_epsilon,
                # Deeper blocks are left out more often.
                drop_path * i / max(len(blocks) - 1, 1),
                dtype=dtype,
                name=f"block_{i}",
                **(around if i in where else {}),
            )(x)
        super().__init__(
            a,
            images,
            in_format(x, a["data_format"]),
            name=name or default_name("conv_next_moe_backbone"),
            **kwargs,
        )
        self.pooled_norm_epsilon = layer_norm_epsilon
