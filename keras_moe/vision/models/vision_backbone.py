import keras
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_rate
from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.layers.encoder_block import EncoderBlock
from keras_moe.vision.layers.patch_embedding import PatchEmbedding
from keras_moe.vision.models.image_backbone import ImageBackbone
from keras_moe.vision.models.image_backbone import as_dtype
from keras_moe.vision.models.image_backbone import as_image_shape
from keras_moe.vision.models.image_backbone import lists_of


class VisionBackbone(ImageBackbone):
    """Base of vision transformers with experts, from images to tokens.

    Args:
        arguments: dict. The arguments of the subclass's constructor, which are
            saved.
        moe_layers: dict of block numbers to feed-forward layers, or lists of
            those of an ensemble's members.
        blocks: dict of block numbers to further arguments of `EncoderBlock`.
        takes_context: list of ints. The blocks that take a second input,
            `task_ids`, as context.
        ensemble_size: int. How often each image is there from the first of
            `moe_layers` on.
        name, trainable: As for `keras.Model`.
    """

    def __init__(
        self,
        arguments,
        moe_layers,
        blocks=None,
        takes_context=(),
        ensemble_size=1,
        *,
        name,
        trainable=True,
    ):
        a = lists_of(arguments)
        dtype = a["dtype"] = as_dtype(a["dtype"])
        check_encoder(a)
        images = keras.Input(as_image_shape(a["image_shape"]), name="images")
        context = None
        if takes_context:
            context = keras.Input((), dtype="int32", name="task_ids")
        embedding = PatchEmbedding(
            a["hidden_dim"],
            a["patch_size"],
            use_class_token=a["use_class_token"],
            positions=a["positions"],
            data_format=a["data_format"],
            dtype=dtype,
            name="patch_embedding",
        )
        x = embedding(images)
        if a["dropout"]:
            x = keras.layers.Dropout(
                a["dropout"], dtype=dtype, name="embedding_dropout"
            )(x)
        ids = context
        for i in range(a["num_layers"]):
            if ensemble_size > 1 and i == min(moe_layers):
                x = _repeated(x, ensemble_size)
                ids = context if ids is None else _repeated(ids, ensemble_size)
            block = encoder_block(
                a, i, moe_layers.get(i), dtype, **(blocks or {}).get(i, {})
            )
            has_context = i in takes_context
            x = block(x, context=ids) if has_context else block(x)
        x = keras.layers.LayerNormalization(
            epsilon=a["layer_norm_epsilon"], dtype=dtype, name="norm"
        )(x)
        if ensemble_size > 1:
            x = ops.reshape(x, (-1, ensemble_size, *x.shape[1:]))
        inputs = images if context is None else [images, context]
        a["data_format"] = embedding.data_format
        super().__init__(a, inputs, x, name=name, trainable=trainable)
        self.use_class_token = a["use_class_token"]
        self.mlp_dim = a["mlp_dim"]
        self.ensemble_size = ensemble_size

    @property
    def pooling_arguments(self):
        first = self.block(0)
        return {
            "num_heads": first.num_heads,
            "mlp_dim": self.mlp_dim,
            "qk_norm": first.qk_norm,
            "layer_norm_epsilon": first.layer_norm_epsilon,
        }


def check_encoder(a):
    """Raises unless the arguments of the blocks of a model are in range."""
    for key in ("num_layers", "num_heads", "hidden_dim", "mlp_dim"):
        check_int(key, a[key], 1)
    for key in ("dropout", "attention_dropout", "drop_path"):
        check_rate(key, a[key])
    if a["hidden_dim"] % a["num_heads"]:
        raise ValueError(
            "`num_heads` must divide `hidden_dim`. Received: "
            f"num_heads={a['num_heads']}, hidden_dim={a['hidden_dim']}"
        )


def encoder_block(
    a, i, feed_forward, dtype, block_class=EncoderBlock, **options
):
    """Block `i` of a model with the arguments `a`; `None` is a dense one."""
    if feed_forward is None:
        feed_forward = VisionMLP(
            a["mlp_dim"],
            a["activation"],
            a["dropout"],
            dtype=dtype,
            name="mlp",
        )
    return block_class(
        a["num_heads"],
        feed_forward,
        qk_norm=a["qk_norm"],
        layer_norm_epsilon=a["layer_norm_epsilon"],
        dropout=a["dropout"],
        attention_dropout=a["attention_dropout"],
        # Deeper blocks are left out more often.
        drop_path=a["drop_path"] * i / max(a["num_layers"] - 1, 1),
        dtype=dtype,
        name=f"block_{i}",
        **options,
    )


def _repeated(x, times):
    """Each entry of the batch several times, one after the other."""
    return ops.reshape(ops.stack([x] * times, axis=1), (-1, *x.shape[1:]))
