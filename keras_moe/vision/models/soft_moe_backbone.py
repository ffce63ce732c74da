import keras

from keras_moe.checks import check_int
from keras_moe.experts.mlp_experts import MLPExperts
from keras_moe.moe.part_arguments import default_name
from keras_moe.moe.soft_moe import SoftMoE
from keras_moe.routers.soft_router import SoftRouter
from keras_moe.vision.models.moe_blocks import moe_block_indices
from keras_moe.vision.models.moe_blocks import own_copy
from keras_moe.vision.models.moe_blocks import per_block
from keras_moe.vision.models.vision_backbone import VisionBackbone
from keras_moe.vision.models.vision_presets import SOFT_MOE


@keras.saving.register_keras_serializable("keras_moe")
class SoftMoEBackbone(VisionBackbone):
    """A vision transformer whose experts get mixtures of tokens (Soft MoE).

    ```
    x = patches of the images @ kernel + bias + positions
    for each block:
        x = x + attention(layer_norm(x))
        x = x + SoftMoE(layer_norm(x))          or a dense feed-forward
    y = layer_norm(x)
    ```

    No token is dropped and there are no losses to balance the experts. Images
    of a batch do not affect each other.

    Args:
        image_shape: Three ints, in the order of `data_format`.
        patch_size: int, or two; must divide the images.
        num_layers: int. Blocks.
        num_heads: int. Attention heads; must divide `hidden_dim`.
        hidden_dim: int. Width of the tokens.
        mlp_dim: int. Width of the hidden layer of experts and dense
            feed-forwards.
        num_experts: int, or a list with one for each block with experts.
            Defaults to `128`.
        slots_per_expert: int, or a list of these. Rows that each expert
            computes for an image. Defaults to `None`, 1 without a `router`.
        moe_layers: Which blocks have experts: `"last_n"` the last n blocks,
            `"every_2"` the odd ones, counted from 0, or a list of ints.
            Defaults to `None`, the second half.
        router_noise: float. Standard deviation of the noise on the logits in
            training. Defaults to `0.0`.
        activation: Activation of experts and dense feed-forwards. Defaults to
            `"gelu_tanh"`.
        expert_dropout, dropout, attention_dropout, drop_path: As for
            `keras_moe.models.VMoEBackbone`. Default to `0.0`.
        use_class_token: bool. Defaults to `False`.
        positions: `"learned"`, `"sincos"` or `None`, as for
            `keras_moe.layers.PatchEmbedding`. Defaults to `"learned"`.
        qk_norm: bool. Whether attention normalizes queries and keys. Defaults
            to `True`.
        layer_norm_epsilon: float. Defaults to `1e-6`.
        data_format, dtype, **kwargs: As for `keras_moe.models.VMoEBackbone`.
        router: A `keras_moe.routers.SoftRouter`, of which each block gets its
            own copy, or a list of these, instead of `slots_per_expert` and
            `router_noise`. With `normalization="rms"` and
            `mix_normalized=True` it is that of soft-moe-pytorch. Defaults to
            `None`, the router of the paper.
        experts: Experts, of which each block gets its own copy, or a list of
            these, instead of `expert_dropout`. Defaults to `None`,
            `keras_moe.experts.MLPExperts` of width `mlp_dim`.

    Input shape:
        `(batch, *image_shape)`

    Output shape:
        `(batch, tokens, hidden_dim)`

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> backbone = keras_moe.models.SoftMoEBackbone(
    ...     image_shape=(32, 32, 3), patch_size=8, num_layers=4, num_heads=2,
    ...     hidden_dim=16, mlp_dim=32, num_experts=4, slots_per_expert=4,
    ... )
    >>> backbone.moe_blocks
    [2, 3]
    >>> tuple(backbone(np.zeros((2, 32, 32, 3))).shape)
    (2, 16, 16)

    Reference:

    - [Puigcerver et al., 2023](https://arxiv.org/abs/2308.00951), section 2
    """

    presets = SOFT_MOE

    def __init__(
        self,
        image_shape,
        patch_size,
        num_layers,
        num_heads,
        hidden_dim,
        mlp_dim,
        num_experts=128,
        slots_per_expert=None,
        moe_layers=None,
        router_noise=0.0,
        activation="gelu_tanh",
        expert_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        use_class_token=False,
        positions="learned",
        qk_norm=True,
        layer_norm_epsilon=1e-6,
        data_format=None,
        dtype=None,
        *,
        router=None,
        experts=None,
        name=None,
        **kwargs,
    ):
        arguments = {
            key: value
            for key, value in locals().items()
            if key not in ("self", "name", "kwargs", "__class__")
        }
        check_int("num_layers", num_layers, 1)
        if moe_layers is None:
            where = list(range(num_layers // 2, num_layers))
        else:
            where = moe_block_indices(
                moe_layers, num_layers, list(range(num_layers))
            )
        several = {
            name: per_block(name, arguments[name], len(where))
            for name in ("num_experts", "slots_per_expert", "router", "experts")
        }
        layers = {
            block: _soft_moe(
                {**arguments, **{k: v[i] for k, v in several.items()}}
            )
            for i, block in enumerate(where)
        }
        super().__init__(
            arguments,
            layers,
            name=name or default_name("soft_moe_backbone"),
            **kwargs,
        )


def _soft_moe(a):
    router, experts = own_copy(a["router"]), own_copy(a["experts"])
    slots = a["slots_per_expert"]
    if router is None:
        router = SoftRouter(
            a["num_experts"],
            1 if slots is None else slots,
            noise_stddev=a["router_noise"],
            dtype=a["dtype"],
            name="router",
        )
        slots = None
    else:
        _refuse_beside("router", a, "router_noise")
    if experts is None:
        experts = MLPExperts(
            a["num_experts"],
            a["mlp_dim"],
            activation=a["activation"],
            dropout=a["expert_dropout"],
            dtype=a["dtype"],
            name="experts",
        )
    else:
        _refuse_beside("experts", a, "expert_dropout")
    return SoftMoE(
        a["num_experts"],
        router=router,
        experts=experts,
        slots_per_expert=slots,
        dtype=a["dtype"],
        name="moe",
    )


def _refuse_beside(part, a, name):
    if a[name]:
        raise ValueError(
            f"`{name}` is an argument of the `{part}` where there is one. "
            f"Received: {name}={a[name]}, {part}={a[part]!r}"
        )
