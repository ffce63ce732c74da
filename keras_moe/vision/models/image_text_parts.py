"""The layers of an `ImageTextMoE`, and what they make of images and texts."""

import math

import keras
from keras import ops

from keras_moe import losses as losses_lib
from keras_moe.checks import check_at_least
from keras_moe.checks import is_number
from keras_moe.losses.entropy_loss import EntropyLoss
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.layers.contrastive_head import ContrastiveHead
from keras_moe.vision.layers.patch_embedding import PatchEmbedding
from keras_moe.vision.layers.text_embedding import TextEmbedding
from keras_moe.vision.models.moe_blocks import moe_block_indices
from keras_moe.vision.models.vision_backbone import encoder_block
from keras_moe.vision.models.vmoe_layers import moe_of_blocks

MODALITIES = ("image", "text")  # by their ids


def image_text_parts(a):
    """dict of the layers of a model with the arguments `a`."""
    dtype, width = a["dtype"], a["projection_dim"] or a["hidden_dim"]
    where = moe_block_indices(
        a["moe_layers"],
        a["num_layers"],
        list(range(1, a["num_layers"], 2)),
    )
    top_k = a["top_k"]
    if top_k is None and a["router"] == "v_moe":
        top_k = 1
    moe = moe_of_blocks(
        {
            **a,
            "top_k": top_k,
            "losses": [*_entropy_losses(a), *losses_lib.get(a["losses"])],
            "group_size": None,
            "ensemble_size": 1,
        },
        where,
    )
    parts = {
        "image_embedding": PatchEmbedding(
            a["hidden_dim"],
            a["patch_size"],
            positions=a["positions"],
            data_format=a["data_format"],
            dtype=dtype,
            name="image_embedding",
        ),
        "text_embedding": TextEmbedding(
            a["vocabulary_size"],
            a["hidden_dim"],
            dtype=dtype,
            name="text_embedding",
        ),
        "dropout": keras.layers.Dropout(
            a["dropout"], dtype=dtype, name="embedding_dropout"
        ),
        "blocks": [
            encoder_block(a, i, moe.get(i), dtype)
            for i in range(a["num_layers"])
        ],
        "norm": keras.layers.LayerNormalization(
            epsilon=a["layer_norm_epsilon"], dtype=dtype, name="norm"
        ),
        "head": ContrastiveHead(
            a["contrastive_loss"], dtype=dtype, name="head"
        ),
    }
    for kind in MODALITIES:
        name = f"{kind}_projection"
        parts[name] = keras.layers.Dense(width, dtype=dtype, name=name)
    return parts


def _entropy_losses(a):
    """The local and the global loss of each modality."""
    for modality, kind in enumerate(MODALITIES):
        local, general = a[f"{kind}_local_weight"], a[f"{kind}_global_weight"]
        check_at_least(f"{kind}_local_weight", local, 0)
        check_at_least(f"{kind}_global_weight", general, 0)
        name, threshold = f"min_{kind}_experts", None
        if a[name] is not None:
            if not is_number(a[name]) or a[name] <= 1:
                raise ValueError(
                    f"`{name}` must be a number above 1 or None. "
                    f"Received: {name}={a[name]!r}"
                )
            threshold = math.log(a[name])
        if local:
            yield EntropyLoss(local, modality=modality)
        if general:
            yield EntropyLoss(general, "marginal", threshold, modality)


def encoded(a, parts, images, texts):
    """A vector for each image and each text, `(B, D)` each.

    Args:
        a: dict. The arguments of the model.
        parts: What `image_text_parts` gave.
        images, texts: Symbolic inputs, or one of them and `None`.

    Returns:
        list of as many as there are inputs.
    """
    tokens, ids, real = [], [], []
    for modality, inputs in enumerate((images, texts)):
        if inputs is None:
            continue
        x = parts[f"{MODALITIES[modality]}_embedding"](inputs)
        tokens.append(parts["dropout"](x) if a["dropout"] else x)
        ids.append(ops.full_like(x[:, :, 0], modality, dtype="int32"))
        is_text = modality == MODALITIES.index("text")
        if is_text and a["padding_id"] is not None:
            real.append(ops.not_equal(inputs, a["padding_id"]))
        else:
            real.append(ops.full_like(ids[-1], True, dtype="bool"))
    x = _joined(tokens)
    context, mask = _joined(ids), _joined(real)
    # Each token reads the real ones of its modality.
    reads = ops.equal(ops.expand_dims(context, 2), ops.expand_dims(context, 1))
    reads = ops.logical_and(reads, ops.expand_dims(mask, 1))
    for block in parts["blocks"]:
        kwargs = {"attention_mask": reads}
        if not isinstance(block.feed_forward, VisionMLP):
            kwargs["token_mask"] = mask
            if _uses_context(block.feed_forward):
                kwargs["context"] = context
        x = block(x, **kwargs)
    x = parts["norm"](x)
    vectors, start = [], 0
    for modality, inputs in enumerate((images, texts)):
        if inputs is None:
            continue
        own = real[len(vectors)]
        part = x[:, start : start + own.shape[1]]
        start += own.shape[1]
        project = parts[f"{MODALITIES[modality]}_projection"]
        vectors.append(project(_mean(part, own)))
    return vectors


def _joined(values):
    return values[0] if len(values) == 1 else ops.concatenate(values, axis=1)


def _uses_context(layer):
    users = (layer.router, *layer.routing_losses)
    return any(user.uses_context for user in users)


def _mean(x, real):
    """The mean over the tokens that are real; 0 if none is."""
    weights = ops.expand_dims(ops.cast(real, x.dtype), -1)
    count = ops.maximum(ops.sum(weights, axis=1), 1.0)
    return ops.sum(x * weights, axis=1) / count
