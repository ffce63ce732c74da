import keras

from keras_moe.checks import as_ints
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_rate
from keras_moe.moe.part_arguments import default_name
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.layers.encoder_block import EncoderBlock
from keras_moe.vision.layers.patch_embedding import PatchEmbedding
from keras_moe.vision.layers.patch_merging import PatchMerging
from keras_moe.vision.layers.window_attention import WindowAttention
from keras_moe.vision.models.image_backbone import ImageBackbone
from keras_moe.vision.models.image_backbone import as_dtype
from keras_moe.vision.models.image_backbone import as_image_shape
from keras_moe.vision.models.moe_blocks import moe_block_indices
from keras_moe.vision.models.moe_blocks import odd_in_stages
from keras_moe.vision.models.stages import check_depths
from keras_moe.vision.models.stages import check_mlp_ratio
from keras_moe.vision.models.stages import feature_map
from keras_moe.vision.models.stages import in_format
from keras_moe.vision.models.stages import numbered_blocks
from keras_moe.vision.models.swin_presets import SWIN_MOE
from keras_moe.vision.models.vmoe_layers import block_arguments
from keras_moe.vision.models.vmoe_layers import check_no_context
from keras_moe.vision.models.vmoe_layers import moe_of_blocks
from keras_moe.vision.models.vmoe_layers import split_moe_arguments

# As in the paper; what differs from a V-MoE.
_MOE = {
    "top_k": 1,
    "capacity_factor": 1.25,
    "capacity_multiple_of": 1,
    "drop_policy": "priority",
}


@keras.saving.register_keras_serializable("keras_moe")
class SwinMoEBackbone(ImageBackbone):
    """A Swin Transformer with experts in some of its blocks (Swin-MoE).

    ```
    x = layer_norm(patches of the images @ kernel + bias)
    for each stage, but for the first after a merging of four neighbours:
        for each block:
            x = x + window attention(layer_norm(x))   odd blocks: shifted
            x = x + MoE(layer_norm(x))                or a dense feed-forward
    y = layer_norm(x)
    ```

    Only in training, the losses that balance the experts are added to the
    model's loss, and choices beyond the capacity are dropped. In inference each
    image is on its own, unless `eval_capacity_factor` is given (the original
    drops in inference too) or the router `looks_ahead`.

    Windows that reach beyond the feature map hold only its tokens. What fills
    them up is seen by no token and by no expert.

    Args:
        image_shape: Three ints, in the order of `data_format`.
        patch_size: int, or two; must divide the images. Defaults to `4`.
        hidden_dim: int. Width of the first stage; each has twice the width of
            the one before. Defaults to `96`.
        depths: list of ints. Blocks of each stage. Defaults to
            `(2, 2, 18, 2)`.
        num_heads: list of ints. Attention heads of each stage. Defaults to
            `(3, 6, 12, 24)`.
        window_size: int. Rows and columns of a window. Defaults to `12`.
        mlp_ratio: float. Width of the hidden layer of experts and dense
            feed-forwards, by that of the stage. Defaults to `4.0`.
        num_experts: int, or a list with one for each block with experts.
            Defaults to `8`.
        moe_layers: Which blocks have experts, counted from 0 through all
            stages: `"every_2"`, `"last_n"` the last n of those that are odd in
            their stage, or a list of ints; an empty one gives the dense model.
            Defaults to `None`, those that are odd in the last two stages, as in
            the paper.
        activation: Activation of experts and dense feed-forwards. Defaults to
            `"gelu"`.
        use_output_bias: bool. Whether the last layers of experts and dense
            feed-forwards have a bias. Defaults to `True`.
        use_qkv_bias: bool. Whether queries, keys and values have a bias.
            Defaults to `True`.
        pretrained_window_size: int, or a list with one for each stage: the
            window that offsets are measured by, 0 for the stage's own. Defaults
            to `0`.
        patch_norm: bool. Whether the patches go through a layer norm. Defaults
            to `True`.
        positions: As for `keras_moe.layers.PatchEmbedding`. Defaults to `None`.
        dropout: float. Rate of the dropout after the embedding, attention and
            dense layers. Defaults to `0.0`.
        attention_dropout: float. Defaults to `0.0`.
        drop_path: float. Share of images that skip a branch of the last block;
            it grows from 0 in the first. Defaults to `0.0`.
        layer_norm_epsilon: float. Defaults to `1e-5`.
        data_format, dtype: As for `keras_moe.models.VMoEBackbone`.
        **kwargs: `name`, `trainable`, and what `VMoEBackbone` has for its
            experts: `router` (`"v_moe"`, or `"swin_moe_cosine"`), `top_k` (1
            by default), `router_noise`, `capacity_factor` (1.25, in
            Tutel's way to round), `eval_capacity_factor`, `drop_policy`
            (`"priority"`), `group_size`, `route_per`, weights of losses,
            `losses`, `num_shared_experts`, `expert_dropout`; besides,
            `normalize_weights` as for `keras_moe.routers.TopKRouter`.

    Input shape:
        `(batch, *image_shape)`

    Output shape:
        `(batch, height, width, channels)`, or with `"channels_first"`
        `(batch, channels, height, width)`: the feature map of the last stage.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> backbone = keras_moe.models.SwinMoEBackbone(
    ...     image_shape=(32, 32, 3), hidden_dim=8, depths=(2, 2),
    ...     num_heads=(2, 4), window_size=4, num_experts=4,
    ... )
    >>> backbone.moe_blocks
    [1, 3]
    >>> tuple(backbone(np.zeros((2, 32, 32, 3))).shape)
    (2, 4, 4, 16)

    Reference:

    - [Hwang et al., 2022](https://arxiv.org/abs/2206.03382), section 5.3
    - [Liu et al., 2021](https://arxiv.org/abs/2103.14030), section 3
    """

    presets = SWIN_MOE

    def __init__(
        self,
        image_shape,
        patch_size=4,
        hidden_dim=96,
        depths=(2, 2, 18, 2),
        num_heads=(3, 6, 12, 24),
        window_size=12,
        mlp_ratio=4.0,
        num_experts=8,
        moe_layers=None,
        activation="gelu",
        use_output_bias=True,
        use_qkv_bias=True,
        pretrained_window_size=0,
        patch_norm=True,
        positions=None,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        layer_norm_epsilon=1e-5,
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
        of_moe, kwargs = split_moe_arguments(kwargs, **_MOE)
        a |= of_moe
        dtype = a["dtype"] = as_dtype(dtype)
        check_depths(depths)
        check_int("hidden_dim", hidden_dim, 1)
        check_int("window_size", window_size, 1)
        check_mlp_ratio(mlp_ratio, hidden_dim)
        for key in ("patch_norm", "use_output_bias", "use_qkv_bias"):
            check_bool(key, a[key])
        for key in ("dropout", "attention_dropout", "drop_path"):
            check_rate(key, a[key])
        heads = as_ints("num_heads", num_heads, len(depths), 1)
        measured = as_ints(
            "pretrained_window_size", pretrained_window_size, len(depths)
        )
        odd = odd_in_stages(depths)
        if moe_layers is None:
            moe_layers = sum(odd[-2:], [])
            if not moe_layers:
                raise ValueError(
                    "`moe_layers` must be given where the last two stages have "
                    "one block each: there is no odd one. Received: "
                    f"moe_layers=None, depths={depths}"
                )
        where = moe_block_indices(moe_layers, sum(depths), sum(odd, []))
        around = block_arguments(a)
        blocks = numbered_blocks(depths)
        widths = [int(hidden_dim * 2**s * mlp_ratio) for s, _ in blocks]
        layers = moe_of_blocks(
            {
                **a,
                "mlp_dim": [widths[i] for i in where],
                "capacity_rule": "tutel",
                "loss_ddof": 1,
            },
            where,
        )
        check_no_context(layers)
        images = keras.Input(as_image_shape(image_shape), name="images")
        embedding = PatchEmbedding(
            hidden_dim,
            patch_size,
            positions=positions,
            data_format=data_format,
            layer_norm_epsilon=layer_norm_epsilon if patch_norm else None,
            dtype=dtype,
            name="patch_embedding",
        )
        x = embedding(images)
        a["data_format"] = embedding.data_format
        if dropout:
            x = keras.layers.Dropout(
                dropout, dtype=dtype, name="embedding_dropout"
            )(x)
        grid = embedding.grid
        for i, (stage, number) in enumerate(blocks):
            if stage and not number:
                x = PatchMerging(
                    grid,
                    layer_norm_epsilon,
                    dtype=dtype,
                    name=f"merging_{stage}",
                )(x)
                grid = tuple(side // 2 for side in grid)
            feed_forward = layers.get(i) or VisionMLP(
                widths[i],
                activation,
                dropout,
                use_output_bias,
                dtype=dtype,
                name="mlp",
            )
            x = EncoderBlock(
                None,
                feed_forward,
                layer_norm_epsilon=layer_norm_epsilon,
                dropout=dropout,
                # Deeper blocks are left out more often.
                drop_path=drop_path * i / max(len(blocks) - 1, 1),
                token_mixer=WindowAttention(
                    heads[stage],
                    grid,
                    window_size,
                    shift=number % 2 * (window_size // 2),
                    pretrained_window_size=measured[stage] or None,
                    use_bias=use_qkv_bias,
                    dropout=attention_dropout,
                    dtype=dtype,
                    name="attention",
                ),
                dtype=dtype,
                name=f"block_{i}",
                **(around if i in where else {}),
            )(x)
        x = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=dtype, name="norm"
        )(x)
        x = in_format(feature_map(x, grid), a["data_format"])
        super().__init__(
            a,
            images,
            x,
            name=name or default_name("swin_moe_backbone"),
            **kwargs,
        )
