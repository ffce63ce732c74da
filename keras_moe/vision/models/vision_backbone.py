import keras

from keras_moe.vision.layers.attention import VisionMLP
from keras_moe.vision.layers.encoder_block import EncoderBlock
from keras_moe.vision.layers.patch_embedding import PatchEmbedding
from keras_moe.vision.models.backbone import Backbone
from keras_moe.vision.models.backbone import as_arguments
from keras_moe.vision.models.backbone import as_image_shape
from keras_moe.vision.models.backbone import drop_path_of


class VisionBackbone(Backbone):
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
        a = as_arguments(arguments)
        dtype = a["dtype"]
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
        a["data_format"] = embedding.data_format
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
                drop_path=drop_path_of(a, i),
                dtype=dtype,
                name=f"block_{i}",
                **(blocks or {}).get(i, {}),
            )
            has_context = i in takes_context
            x = block(x, context=context) if has_context else block(x)
        x = keras.layers.LayerNormalization(
            epsilon=a["layer_norm_epsilon"], dtype=dtype, name="norm"
        )(x)
        super().__init__(
            a,
            images if context is None else [images, context],
            x,
            name=name,
            trainable=trainable,
        )
        self.use_class_token = a["use_class_token"]
        self.mlp_dim = a["mlp_dim"]
