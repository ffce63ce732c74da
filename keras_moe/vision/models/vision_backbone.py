import keras

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
        moe_layers: dict of block numbers to feed-forward layers.
        blocks: dict of block numbers to further arguments of `EncoderBlock`.
        takes_context: list of ints. The blocks that take a second input,
            `task_ids`, as context.
        name, trainable: As for `keras.Model`.
    """

    def __init__(
        self,
        arguments,
        moe_layers,
        blocks=None,
        takes_context=(),
        *,
        name,
        trainable=True,
    ):
        a = lists_of(arguments)
        dtype = a["dtype"] = as_dtype(a["dtype"])
        for key in ("num_layers", "num_heads", "hidden_dim", "mlp_dim"):
            check_int(key, a[key], 1)
        for key in ("dropout", "attention_dropout", "drop_path"):
            check_rate(key, a[key])
        if a["hidden_dim"] % a["num_heads"]:
            raise ValueError(
                "`num_heads` must divide `hidden_dim`. Received: "
                f"num_heads={a['num_heads']}, hidden_dim={a['hidden_dim']}"
            )
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
        for i in range(a["num_layers"]):
            feed_forward = moe_layers.get(i)
            if feed_forward is None:
                feed_forward = VisionMLP(
                    a["mlp_dim"],
                    a["activation"],
                    a["dropout"],
                    dtype=dtype,
                    name="mlp",
                )
            block = EncoderBlock(
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
                **(blocks or {}).get(i, {}),
            )
            has_context = i in takes_context
            x = block(x, context=context) if has_context else block(x)
        x = keras.layers.LayerNormalization(
            epsilon=a["layer_norm_epsilon"], dtype=dtype, name="norm"
        )(x)
        inputs = images if context is None else [images, context]
        a["data_format"] = embedding.data_format
        super().__init__(a, inputs, x, name=name, trainable=trainable)
        self.use_class_token = a["use_class_token"]
        self.mlp_dim = a["mlp_dim"]

    @property
    def pooling_arguments(self):
        first = self.block(0)
        return {
            "num_heads": first.num_heads,
            "mlp_dim": self.mlp_dim,
            "qk_norm": first.qk_norm,
            "layer_norm_epsilon": first.layer_norm_epsilon,
        }
