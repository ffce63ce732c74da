import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_int
from keras_moe.checks import check_rate
from keras_moe.moe.model_config import deserialized
from keras_moe.moe.model_config import made_again
from keras_moe.moe.part_arguments import as_layer
from keras_moe.moe.part_arguments import default_name
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.vision.models.classifier_graph import check_pooling
from keras_moe.vision.models.classifier_graph import one_or_more
from keras_moe.vision.models.classifier_graph import pooled
from keras_moe.vision.models.classifier_graph import raw_images
from keras_moe.vision.models.cond_conv_presets import COND_CONV
from keras_moe.vision.models.dense_presets import CONVNEXT
from keras_moe.vision.models.dense_presets import MIXER
from keras_moe.vision.models.image_backbone import BackboneTask
from keras_moe.vision.models.image_backbone import ImageBackbone
from keras_moe.vision.models.image_backbone import as_dtype
from keras_moe.vision.models.image_backbone import frozen_parts
from keras_moe.vision.models.swin_presets import SWIN_MOE
from keras_moe.vision.models.vision_presets import SOFT_MOE
from keras_moe.vision.models.vision_presets import VMOE
from keras_moe.vision.models.vmoe_backbone import VMoEBackbone


@keras.saving.register_keras_serializable("keras_moe")
class MoEImageClassifier(BackboneTask, keras.Model):
    """Classifies images by the tokens or the feature map of a backbone.

    ```
    x = pooling(backbone(images))
    x = tanh(x @ pre_logits kernel + bias)      with a `representation_dim`
    y = activation(dropout(x) @ kernel + bias)
    ```

    With a backbone that is an ensemble, there is a `y` for each member. In
    training each of them learns the labels, as in
    `model.fit(images, np.repeat(labels[:, None], ensemble_size, axis=1))`. The
    prediction of the ensemble is the mean over the members' probabilities.

    With a `preprocessor`, `images` are what it makes of the input, in `fit`,
    `predict` and exported models alike.

    Args:
        backbone: A backbone of `keras_moe.models`, of which images come out as
            tokens or as a feature map.
        num_classes: int.
        preprocessor: A layer from raw images to those of the backbone, such as
            `keras_moe.layers.ImageConverter`, which takes any size if it has an
            `image_size`. Defaults to `None`.
        pooling: `"token"` takes the class token, `"gap"` the mean over the
            patches or the feature map, `"map"` the attention of a learned query
            over tokens (`keras_moe.layers.AttentionPooling`). Defaults to
            `None`: `"token"` if the backbone has a class token, otherwise
            `"gap"`.
        activation: Activation of the output. Defaults to `None`: logits.
        dropout: float. Rate of the dropout before the output. Defaults to
            `0.0`.
        representation_dim: int, or `None`. Width of a layer with `tanh` before
            the output. Defaults to `None`.
        head_dtype: As for `keras.layers.Layer`, for the output. Defaults to
            `None`, the dtype of the backbone.
        name, trainable: As for `keras.Model`.

    Input shape:
        That of the backbone.

    Output shape:
        `(batch, num_classes)`, with an ensemble
        `(batch, ensemble_size, num_classes)`.

    Raises:
        ValueError: If an argument is out of range, or the backbone has no class
            token to take, or no attention to pool with.

    Example:

    >>> backbone = keras_moe.models.VMoEBackbone(
    ...     image_shape=(16, 16, 3), patch_size=8, num_layers=2, num_heads=2,
    ...     hidden_dim=8, mlp_dim=16, num_experts=4, moe_layers="every_2",
    ... )
    >>> model = keras_moe.models.MoEImageClassifier(backbone, num_classes=10)
    >>> tuple(model(np.zeros((2, 16, 16, 3))).shape)
    (2, 10)

    Reference:

    - [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 2
    - [Zhai et al., 2021](https://arxiv.org/abs/2106.04560), section 3.2
      (`"map"`)
    """

    backbone_class = ImageBackbone
    presets = {
        **VMOE,
        **SOFT_MOE,
        **SWIN_MOE,
        **CONVNEXT,
        **MIXER,
        **COND_CONV,
    }

    def __init__(
        self,
        backbone,
        num_classes,
        preprocessor=None,
        pooling=None,
        activation=None,
        dropout=0.0,
        representation_dim=None,
        head_dtype=None,
        *,
        name=None,
        trainable=True,
    ):
        self.check_backbone(backbone)
        check_int("num_classes", num_classes, 1)
        check_rate("dropout", dropout)
        if pooling is None:
            pooling = "token" if backbone.use_class_token else "gap"
        check_pooling(pooling, backbone)
        if representation_dim is not None:
            check_int("representation_dim", representation_dim, 1)
        activation = as_keras_object(
            "activation", keras.activations.get, activation
        )
        dtype = backbone.dtype_policy
        head_dtype = dtype if head_dtype is None else as_dtype(head_dtype)
        preprocessor = as_layer("preprocessor", preprocessor)
        images = inputs = backbone.inputs
        if preprocessor is not None and self.is_in_graph(preprocessor):
            images, inputs = raw_images(preprocessor, inputs)
        x, members = backbone(one_or_more(images)), backbone.ensemble_size
        if members > 1:
            x = ops.reshape(x, (-1, *x.shape[2:]))
        x = pooled(backbone, x, pooling, dtype)
        inputs = one_or_more(inputs)
        if representation_dim is not None:
            x = keras.layers.Dense(
                representation_dim, "tanh", dtype=dtype, name="pre_logits"
            )(x)
        if dropout:
            x = keras.layers.Dropout(dropout, dtype=head_dtype, name="dropout")(
                x
            )
        x = keras.layers.Dense(
            num_classes, activation, dtype=head_dtype, name="predictions"
        )(x)
        if members > 1:
            x = ops.reshape(x, (-1, members, num_classes))
        super().__init__(
            inputs=inputs,
            outputs=x,
            name=name or default_name("moe_image_classifier"),
            trainable=trainable,
        )
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.dtype_policy = dtype
        arguments = {
            "num_classes": num_classes,
            "pooling": pooling,
            "activation": activation,
            "dropout": dropout,
            "representation_dim": representation_dim,
            "head_dtype": head_dtype,
        }
        # A function, since Keras would save a plain attribute.
        self._arguments = lambda: dict(arguments)

    @classmethod
    def is_in_graph(cls, preprocessor):
        """Whether a preprocessor is a part of the model's graph."""
        return True

    @property
    def activation(self):
        return self._arguments()["activation"]

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            **frozen_parts(self),
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "preprocessor": serialize_part(self.preprocessor),
            **self._arguments(),
            "activation": keras.activations.serialize(self.activation),
            "head_dtype": keras.dtype_policies.serialize(
                self._arguments()["head_dtype"]
            ),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return made_again(cls, *deserialized(config, custom_objects))


@keras.saving.register_keras_serializable("keras_moe")
class VMoEImageClassifier(MoEImageClassifier):
    """A `MoEImageClassifier` of a `VMoEBackbone`, with the same arguments.

    Raises:
        ValueError: As `MoEImageClassifier`, and if the backbone is another.

    Example:

    ```python
    model = keras_moe.models.VMoEImageClassifier.from_preset(
        "v_moe_s32_e8_last_2", num_classes=10
    )
    ```

    Reference:

    - [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 2
    """

    backbone_class = VMoEBackbone
    presets = VMOE
