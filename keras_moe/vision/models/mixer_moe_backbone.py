import keras

from keras_moe.checks import check_int
from keras_moe.checks import check_rate
from keras_moe.moe.part_arguments import default_name
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.layers.encoder_block import EncoderBlock
from keras_moe.vision.layers.patch_embedding import PatchEmbedding
from keras_moe.vision.layers.token_mixing import TokenMixing
from keras_moe.vision.models.dense_presets import MIXER
from keras_moe.vision.models.image_backbone import ImageBackbone
from keras_moe.vision.models.image_backbone import as_dtype
from keras_moe.vision.models.image_backbone import as_image_shape
from keras_moe.vision.models.moe_blocks import moe_block_indices
from keras_moe.vision.models.vmoe_layers import block_arguments
from keras_moe.vision.models.vmoe_layers import check_no_context
from keras_moe.vision.models.vmoe_layers import moe_of_blocks
from keras_moe.vision.models.vmoe_layers import split_moe_arguments


@keras.saving.register_keras_serializable("keras_moe")
class MixerMoEBackbone(ImageBackbone):
    """An MLP-Mixer with experts in some of its blocks.

    ```
    x = patches of the images @ kernel + bias
    for each block:
        x = x + transpose(MLP(transpose(layer_norm(x))))   or MoE: of channels
        x = x + MoE(layer_norm(x))                         or MLP: of tokens
    y = layer_norm(x)
    ```

    Only in training, the losses that balance the experts are added to the
    model's loss, and choices beyond the capacity are dropped. In inference each
    image is on its own, unless `eval_capacity_factor` is given or the router
    `looks_ahead`.

    Args:
        image_shape: Three ints, in the order of `data_format`. The MLPs across
            tokens fit images of this size alone.
        patch_size: int, or two; must divide the images.
        num_layers: int. Blocks.
        hidden_dim: int. Width of the tokens.
        token_mlp_dim: int. Width of the hidden layer across tokens, of experts
            and dense feed-forwards.
        mlp_dim: int. The same across channels.
        num_experts: int, or a list with one for each block with experts.
            Defaults to `8`.
        moe_layers: Which blocks have experts across channels: `"every_2"` the
            odd ones, counted from 0, `"last_n"` the last n of the odd ones, or
            a list of ints; an empty one gives none. Defaults to `"last_2"`.
        token_moe_layers: The same across tokens, where each channel is routed.
            Lists of other arguments are for these blocks, too. Defaults to
            `()`.
        activation: Activation of experts and dense feed-forwards. Defaults to
            `"gelu"`.
        dropout: float. Rate of the dropout in the dense feed-forwards and after
            the embedding. Defaults to `0.0`.
        drop_path: float. Share of images that skip a branch of the last block;
            it grows from 0 in the first. Defaults to `0.0`.
        layer_norm_epsilon: float. Defaults to `1e-6`.
        data_format, dtype: As for `keras_moe.models.VMoEBackbone`.
        **kwargs: As for `keras_moe.models.ConvNeXtMoEBackbone`.

    Input shape:
        `(batch, *image_shape)`

    Output shape:
        `(batch, tokens, hidden_dim)`

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> backbone = keras_moe.models.MixerMoEBackbone(
    ...     image_shape=(32, 32, 3), patch_size=8, num_layers=4, hidden_dim=16,
    ...     token_mlp_dim=8, mlp_dim=32, num_experts=4, token_moe_layers=[3],
    ... )
    >>> backbone.moe_blocks, backbone.token_moe_blocks
    ([1, 3], [3])
    >>> tuple(backbone(np.zeros((2, 32, 32, 3))).shape)
    (2, 16, 16)

    Reference:

    - [Tolstikhin et al., 2021](https://arxiv.org/abs/2105.01601), section 2
    - [Lou et al., 2021](https://arxiv.org/abs/2109.02008) (experts)
    """

    presets = MIXER

    def __init__(
        self,
        image_shape,
        patch_size,
        num_layers,
        hidden_dim,
        token_mlp_dim,
        mlp_dim,
        num_experts=8,
        moe_layers="last_2",
        token_moe_layers=(),
        activation="gelu",
        dropout=0.0,
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
        for key in ("num_layers", "hidden_dim", "token_mlp_dim", "mlp_dim"):
            check_int(key, a[key], 1)
        for key in ("dropout", "drop_path"):
            check_rate(key, a[key])
        odd = list(range(1, num_layers, 2))
        where = moe_block_indices(moe_layers, num_layers, odd)
        across_tokens = moe_block_indices(
            token_moe_layers, num_layers, odd, "token_moe_layers"
        )
        around = block_arguments(a)
        if across_tokens and around["group_size"] is not None:
            raise ValueError(
                "With `token_moe_layers`, where channels are routed, "
                "`group_size` must be None or 'image'. "
                f"Received: group_size={a['group_size']}"
            )
        layers = moe_of_blocks(a, where)
        check_no_context(layers)
        mixers = moe_of_blocks({**a, "mlp_dim": token_mlp_dim}, across_tokens)
        check_no_context(mixers)

        def mlp(width):
            return VisionMLP(
                width, activation, dropout, dtype=dtype, name="mlp"
            )

        images = keras.Input(as_image_shape(image_shape), name="images")
        embedding = PatchEmbedding(
            hidden_dim,
            patch_size,
            positions=None,
            data_format=data_format,
            dtype=dtype,
            name="patch_embedding",
        )
        x = embedding(images)
        a["data_format"] = embedding.data_format
        if dropout:
            x = keras.layers.Dropout(
                dropout, dtype=dtype, name="embedding_dropout"
            )(x)
        for i in range(num_layers):
            x = EncoderBlock(
                None,
                layers.get(i) or mlp(mlp_dim),
                layer_norm_epsilon=layer_norm_epsilon,
                # Deeper blocks are left out more often.
                drop_path=drop_path * i / max(num_layers - 1, 1),
                token_mixer=TokenMixing(
                    mixers.get(i) or mlp(token_mlp_dim),
                    around["route_per"] if i in across_tokens else "token",
                    dtype=dtype,
                    name="token_mixing",
                ),
                dtype=dtype,
                name=f"block_{i}",
                **(around if i in where else {}),
            )(x)
        x = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=dtype, name="norm"
        )(x)
        super().__init__(
            a,
            images,
            x,
            name=name or default_name("mixer_moe_backbone"),
            **kwargs,
        )

    @property
    def token_moe_blocks(self):
        """The numbers of the blocks with experts across tokens."""
        return [
            i
            for i in range(self.num_blocks)
            if not isinstance(self.block(i).token_mixer.feed_forward, VisionMLP)
        ]
