import math

import keras

from keras_moe.checks import check_int
from keras_moe.moe.part_arguments import default_name
from keras_moe.vision.models.moe_blocks import moe_block_indices
from keras_moe.vision.models.vision_backbone import VisionBackbone
from keras_moe.vision.models.vision_presets import VMOE
from keras_moe.vision.models.vmoe_layers import block_arguments
from keras_moe.vision.models.vmoe_layers import moe_of_blocks


@keras.saving.register_keras_serializable("keras_moe")
class VMoEBackbone(VisionBackbone):
    """A vision transformer with experts in some of its blocks (V-MoE).

    ```
    x = [class_token, patches of the images @ kernel + bias] + positions
    for each block:
        x = x + attention(layer_norm(x))
        x = x + MoE(layer_norm(x))              or a dense feed-forward
    y = layer_norm(x)
    ```

    Only in training, the losses that balance the experts are added to the
    model's loss, and choices beyond the capacity are dropped: then what a token
    gets depends on the tokens that it is routed with. In inference nothing is
    dropped unless `eval_capacity_factor` is given, and each image is on its
    own; not so with a router that `looks_ahead`, such as `"expert_choice"`,
    unless `group_size="image"`.

    Args:
        image_shape: Three ints, in the order of `data_format`.
        patch_size: int, or two; must divide the images.
        num_layers: int. Blocks.
        num_heads: int. Attention heads; must divide `hidden_dim`.
        hidden_dim: int. Width of the tokens.
        mlp_dim: int. Width of the hidden layer of experts and dense
            feed-forwards.
        num_experts: int, or a list with one for each block with experts.
            Defaults to `8`.
        moe_layers: Which blocks have experts: `"every_2"` the odd ones,
            counted from 0, `"last_n"` the last n of the odd ones, as in the
            paper, or a list of ints; an empty one gives the dense model.
            Defaults to `"last_2"`.
        router: A name of `keras_moe.routers.get`, a router, of which each block
            gets its own copy, or a list of these. Defaults to `"v_moe"`.
        top_k: int. Experts per token, for routers given by name. Defaults to
            `None`, what the router has by default, 2 for `"v_moe"`.
        router_noise: float, or `None`. Width of the noise on the logits in
            training, times the number of experts, for routers given by name.
            Defaults to `None`, what the router has, 1 for `"v_moe"`.
        capacity_factor: float, `None` or infinity for no limit, or a list of
            these. The capacity of the experts in training, or where experts
            choose, in both. Defaults to `1.05`.
        eval_capacity_factor: The same in inference. Defaults to infinity.
        capacity_multiple_of: int. The capacity is rounded up to a multiple.
            Defaults to `4`.
        drop_policy: As for `keras_moe.layers.Capacity`; `"priority"` is batch
            prioritized routing. Defaults to `"position"`.
        group_size: Which tokens share a capacity and have losses together:
            `None` all of the batch, `"image"` those of an image, or that many
            tokens in the order of the batch, wherever an image ends. Defaults
            to `None`.
        route_per: `"token"`, or `"image"` to send all tokens of an image to
            the same experts, by their mean. Defaults to `"token"`.
        importance_loss_weight, load_loss_weight: floats. Weights of
            `keras_moe.losses.ImportanceLoss` and `LoadLoss`; the second only
            for routers that tell a load, neither where experts choose. Default
            to `5e-3`.
        load_balancing_loss_weight: float. Weight of `LoadBalancingLoss`, as
            GShard has it. Defaults to `0.0`.
        losses: Further losses of each block, as for `keras_moe.layers.MoE`.
            Defaults to `None`.
        num_shared_experts: int. Experts that all tokens go through. Defaults
            to `0`.
        activation: Activation of experts and dense feed-forwards. Defaults to
            `"gelu_tanh"`.
        expert_dropout: float. Rate of the dropout in the experts. Defaults to
            `0.0`.
        dropout: float. Rate of the dropout after the embedding, attention and
            dense layers. Defaults to `0.0`.
        attention_dropout: float. Defaults to `0.0`.
        drop_path: float. Share of images that skip a branch of the last block;
            it grows from 0 in the first. Defaults to `0.0`.
        use_class_token: bool. Defaults to `True`.
        positions: `"learned"`, `"sincos"` or `None`, as for
            `keras_moe.layers.PatchEmbedding`. Defaults to `"learned"`.
        qk_norm: bool. Whether attention normalizes queries and keys. Defaults
            to `False`.
        layer_norm_epsilon: float. Defaults to `1e-6`.
        ensemble_size: int, `M`. From the first block with experts on, each
            image is there `M` times, once for each member of an ensemble, which
            has `num_experts / M` experts of its own and shares all else (E3).
            Losses are the mean over the members. A `router` given as an object
            is that of a member, and `group_size` counts the tokens of all.
            Defaults to `1`.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to
            `None`, that of the Keras configuration.
        dtype: As for `keras.layers.Layer`, or a DTypePolicyMap.
            Defaults to `None`.
        **kwargs: `name` and `trainable`.

    Input shape:
        `(batch, *image_shape)`. If a router needs a context, such as
        `TaskRouter`, a second input `task_ids` `(batch,)`.

    Output shape:
        `(batch, tokens, hidden_dim)`, the class token first; with an ensemble
        `(batch, ensemble_size, tokens, hidden_dim)`.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> backbone = keras_moe.models.VMoEBackbone(
    ...     image_shape=(32, 32, 3), patch_size=8, num_layers=4, num_heads=2,
    ...     hidden_dim=16, mlp_dim=32, num_experts=4,
    ... )
    >>> backbone.moe_blocks
    [1, 3]
    >>> tuple(backbone(np.zeros((2, 32, 32, 3))).shape)
    (2, 17, 16)

    Reference:

    - [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 2 and
      appendix A
    - [Allingham et al., 2021](https://arxiv.org/abs/2110.03360), section 4
      (`ensemble_size`)
    """

    presets = VMOE

    def __init__(
        self,
        image_shape,
        patch_size,
        num_layers,
        num_heads,
        hidden_dim,
        mlp_dim,
        num_experts=8,
        moe_layers="last_2",
        router="v_moe",
        top_k=None,
        router_noise=None,
        capacity_factor=1.05,
        eval_capacity_factor=math.inf,
        capacity_multiple_of=4,
        drop_policy="position",
        group_size=None,
        route_per="token",
        importance_loss_weight=5e-3,
        load_loss_weight=5e-3,
        load_balancing_loss_weight=0.0,
        losses=None,
        num_shared_experts=0,
        activation="gelu_tanh",
        expert_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        use_class_token=True,
        positions="learned",
        qk_norm=False,
        layer_norm_epsilon=1e-6,
        data_format=None,
        dtype=None,
        *,
        ensemble_size=1,
        name=None,
        **kwargs,
    ):
        arguments = {
            key: value
            for key, value in locals().items()
            if key not in ("self", "name", "kwargs", "__class__")
        }
        check_int("num_layers", num_layers, 1)
        block = block_arguments(arguments)
        where = moe_block_indices(
            moe_layers, num_layers, list(range(1, num_layers, 2))
        )
        if ensemble_size > 1 and not where:
            raise ValueError(
                "With an ensemble, `moe_layers` must name a block. Received: "
                f"ensemble_size={ensemble_size}, moe_layers={moe_layers!r}"
            )
        layers = moe_of_blocks(arguments, where)
        context = [
            i
            for i, layer in layers.items()
            if (layer[0] if ensemble_size > 1 else layer).router.uses_context
        ]
        super().__init__(
            arguments,
            layers,
            dict.fromkeys(where, block),
            takes_context=context,
            ensemble_size=ensemble_size,
            name=name or default_name("v_moe_backbone"),
            **kwargs,
        )
