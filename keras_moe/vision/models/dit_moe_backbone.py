import math

import keras

from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.moe.part_arguments import default_name
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.layers.dit_block import DiTBlock
from keras_moe.vision.layers.dit_ends import DiffusionEmbedding
from keras_moe.vision.layers.dit_ends import DiTHead
from keras_moe.vision.layers.patch_embedding import PatchEmbedding
from keras_moe.vision.models.image_backbone import BlockModel
from keras_moe.vision.models.image_backbone import as_dtype
from keras_moe.vision.models.image_backbone import as_image_shape
from keras_moe.vision.models.image_backbone import lists_of
from keras_moe.vision.models.moe_blocks import moe_block_indices
from keras_moe.vision.models.vision_backbone import check_encoder
from keras_moe.vision.models.vision_backbone import encoder_block
from keras_moe.vision.models.vision_presets import DIT_MOE
from keras_moe.vision.models.vmoe_layers import moe_of_blocks


@keras.saving.register_keras_serializable("keras_moe")
class DiTMoEBackbone(BlockModel):
    """A diffusion transformer with experts, for images of classes (DiT-MoE).

    ```
    x = patches of the images @ kernel + bias + positions
    c = mlp(waves of the time steps) + embeddings of the labels
    for each block:
        s1, c1, g1, s2, c2, g2 = split(silu(c) @ kernel + bias)
        x = x + g1 * attention(norm(x) * (1 + c1) + s1)
        x = x + g2 * MoE(norm(x) * (1 + c2) + s2)     or a dense feed-forward
    y = images of dense(norm(x) * (1 + scale) + shift)
    ```

    It predicts the noise of noisy images. `keras_moe.models.DiffusionTask`
    trains it and draws images.

    Blocks and output start with zeros (adaLN-Zero). In training labels are
    dropped, which guidance needs. By default an image does not depend on the
    rest of the batch, not even with `router="expert_choice"`; with
    `group_size=None` it does where experts choose, or in training where they
    have a capacity.

    Args:
        image_shape: Three ints, in the order of `data_format`.
        patch_size: int, or two; must divide the images.
        num_layers: int. Blocks.
        num_heads: int. Attention heads; must divide `hidden_dim`.
        hidden_dim: int. Width of the tokens.
        mlp_dim: int. Width of the hidden layer of experts and dense
            feed-forwards.
        num_classes: int. Label `num_classes` stands for no class.
        num_experts: int, or a list with one for each block with experts.
            Defaults to `8`.
        moe_layers: Which blocks have experts: `None` all of them, `"every_2"`
            the odd ones, counted from 0, `"last_n"` the last n, or a list of
            ints. Defaults to `None`.
        router: A name of `keras_moe.routers.get`, a router, of which each block
            gets its own copy, or a list of these. `"expert_choice"` makes it an
            EC-DiT. Defaults to `"dit_moe"`.
        router_inputs: What routers see, as for `keras_moe.layers.DiTBlock`.
            Defaults to `"modulated"`.
        top_k: int. Experts per token, for routers given by name. Defaults to
            `None`, what the router has by default, 2 for `"dit_moe"`.
        capacity_factor: float, `None` for no limit, or a list of these. The
            capacity of the experts in training, or where experts choose, how
            many a token has on average, in both; `None` is then 2. Defaults to
            `None`.
        eval_capacity_factor: The same in inference. Defaults to infinity.
        group_size: Which tokens share a capacity, have a loss together, or are
            chosen from: `"image"` those of an image, `None` all of the batch,
            or that many tokens in the order of the batch. Defaults to
            `"image"`.
        load_balancing_loss_weight: float. Weight of
            `keras_moe.losses.LoadBalancingLoss`, for routers that need it.
            Defaults to `1e-2`.
        losses: Further losses of each block, as for `keras_moe.layers.MoE`.
            Defaults to `None`.
        num_shared_experts: int. Experts that all tokens go through. Defaults
            to `2`.
        shared_mlp_dim: int. Width of the hidden layer of a shared expert.
            Defaults to `None`, which is `hidden_dim`.
        activation: Activation of the gated experts; dense feed-forwards have
            `"gelu_tanh"`. Defaults to `"silu"`.
        label_dropout: float. Share of the labels that training drops. Defaults
            to `0.1`.
        learn_sigma: bool. Whether the output has twice the channels: the noise,
            then what tells the variance. Defaults to `False`.
        expert_dropout, dropout, attention_dropout, drop_path: As for
            `keras_moe.models.VMoEBackbone`. Default to `0.0`.
        positions: `"learned"`, `"sincos"` or `None`, as for
            `keras_moe.layers.PatchEmbedding`. Defaults to `"sincos"`.
        qk_norm: bool. Whether attention normalizes queries and keys. Defaults
            to `False`.
        layer_norm_epsilon: float. Defaults to `1e-6`.
        data_format, dtype, **kwargs: As for `keras_moe.models.VMoEBackbone`.

    Input shape:
        A dict of `images` `(batch, *image_shape)`, `timesteps` `(batch,)`
        floats, and `labels` `(batch,)` ints.

    Output shape:
        `(batch, *image_shape)`, with twice the channels if `learn_sigma`.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> backbone = keras_moe.models.DiTMoEBackbone(
    ...     image_shape=(16, 16, 3), patch_size=4, num_layers=2, num_heads=2,
    ...     hidden_dim=16, mlp_dim=32, num_classes=10, num_experts=4,
    ... )
    >>> noise = backbone({
    ...     "images": np.zeros((2, 16, 16, 3)),
    ...     "timesteps": np.array([0.0, 999.0]),
    ...     "labels": np.array([3, 10]),
    ... })
    >>> tuple(noise.shape)
    (2, 16, 16, 3)

    Reference:

    - [Fei et al., 2024](https://arxiv.org/abs/2407.11633), section 2
    - [Peebles and Xie, 2022](https://arxiv.org/abs/2212.09748), section 3
    - [Sun et al., 2024](https://arxiv.org/abs/2410.02098), section 3 (EC-DiT)
    """

    presets = DIT_MOE

    def __init__(
        self,
        image_shape,
        patch_size,
        num_layers,
        num_heads,
        hidden_dim,
        mlp_dim,
        num_classes,
        num_experts=8,
        moe_layers=None,
        router="dit_moe",
        router_inputs="modulated",
        top_k=None,
        capacity_factor=None,
        eval_capacity_factor=math.inf,
        group_size="image",
        load_balancing_loss_weight=1e-2,
        losses=None,
        num_shared_experts=2,
        shared_mlp_dim=None,
        activation="silu",
        label_dropout=0.1,
        learn_sigma=False,
        expert_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        positions="sincos",
        qk_norm=False,
        layer_norm_epsilon=1e-6,
        data_format=None,
        dtype=None,
        *,
        name=None,
        **kwargs,
    ):
        arguments = {
            key: value
            for key, value in locals().items()
            if key not in ("self", "name", "kwargs", "__class__")
        }
        a = lists_of(arguments)
        a["dtype"] = as_dtype(dtype)
        check_encoder(a)
        check_bool("learn_sigma", learn_sigma)
        check_int("num_shared_experts", num_shared_experts, 0)
        if shared_mlp_dim is not None:
            check_int("shared_mlp_dim", shared_mlp_dim, 1)
        if group_size not in (None, "image"):
            check_int("group_size", group_size, 1)
        everywhere = list(range(num_layers))
        where = everywhere
        if moe_layers is not None:
            where = moe_block_indices(moe_layers, num_layers, everywhere)
        inputs = {
            "images": keras.Input(as_image_shape(image_shape), name="images"),
            "timesteps": keras.Input((), name="timesteps"),
            "labels": keras.Input((), dtype="int32", name="labels"),
        }
        x, condition, embedding = _embedded(a, inputs)
        a["data_format"] = embedding.data_format
        x = _blocks(a, where, x, condition)
        channels = embedding.image_size(inputs["images"].shape)[-1]
        x = DiTHead(
            embedding.grid,
            embedding.patch_size,
            channels * (2 if learn_sigma else 1),
            embedding.data_format,
            layer_norm_epsilon,
            dtype=a["dtype"],
            name="head",
        )(x, condition)
        super().__init__(
            a,
            inputs,
            x,
            name=name or default_name("dit_moe_backbone"),
            **kwargs,
        )
        self.num_classes = num_classes
        self.learn_sigma = bool(learn_sigma)


def _embedded(a, inputs):
    embedding = PatchEmbedding(
        a["hidden_dim"],
        a["patch_size"],
        positions=a["positions"],
        data_format=a["data_format"],
        dtype=a["dtype"],
        name="patch_embedding",
    )
    x = embedding(inputs["images"])
    condition = DiffusionEmbedding(
        a["hidden_dim"],
        a["num_classes"],
        a["label_dropout"],
        dtype=a["dtype"],
        name="condition",
    )(inputs["timesteps"], inputs["labels"])
    return x, condition, embedding


def _blocks(a, where, x, condition):
    moe = moe_of_blocks(
        {
            **a,
            "experts": "glu",
            "shared_mlp_dim": a["shared_mlp_dim"] or a["hidden_dim"],
            "router_noise": None,
            "capacity_multiple_of": 1,
            "drop_policy": "position",
            "importance_loss_weight": 0.0,
            "load_loss_weight": 0.0,
            "assignments": "all",
        },
        where,
    )
    for i in range(a["num_layers"]):
        options, feed_forward = {}, moe.get(i)
        if feed_forward is None:
            feed_forward = VisionMLP(
                a["mlp_dim"],
                dropout=a["dropout"],
                dtype=a["dtype"],
                name="mlp",
            )
        else:
            options["router_inputs"] = a["router_inputs"]
            if a["group_size"] != "image":
                options["group_size"] = a["group_size"]
        block = encoder_block(
            a, i, feed_forward, a["dtype"], DiTBlock, **options
        )
        x = block(x, condition)
    return x
