import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_rate
from keras_moe.moe.model_config import deserialized
from keras_moe.moe.model_config import made_again
from keras_moe.moe.part_arguments import default_name
from keras_moe.vision.layers.attention_pooling import AttentionPooling
from keras_moe.vision.models.backbone import BackboneTask
from keras_moe.vision.models.backbone import as_dtype
from keras_moe.vision.models.backbone import frozen_parts
from keras_moe.vision.models.vision_backbone import VisionBackbone
from keras_moe.vision.models.vision_presets import SOFT_MOE
from keras_moe.vision.models.vision_presets import VMOE
from keras_moe.vision.models.vmoe_backbone import VMoEBackbone

POOLINGS = ("token", "gap", "map")


@keras.saving.register_keras_serializable("keras_moe")
class MoEImageClassifier(BackboneTask, keras.Model):
    """Classifies images by the tokens of a backbone.

    ```
    x = pooling(backbone(images))
    x = tanh(x @ pre_logits kernel + bias)      with a `representation_dim`
    y = activation(dropout(x) @ kernel + bias)
    ```

    Args:
        backbone: A `keras_moe.models.VMoEBackbone` or `SoftMoEBackbone`.
        num_classes: int.
        pooling: `"token"` takes the class token, `"gap"` the mean over the
            patches, `"map"` the attention of a learned query
            (`keras_moe.layers.AttentionPooling`). Defaults to `None`:
            `"token"` if the backbone has a class token, otherwise `"gap"`.
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
        `(batch, num_classes)`

    Raises:
        ValueError: If an argument is out of range, or the backbone has no class
            token to take.

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

    backbone_class = VisionBackbone
    presets = {**VMOE, **SOFT_MOE}

    def __init__(
        self,
        backbone,
        num_classes,
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
        check_one_of("pooling", pooling, POOLINGS)
        if pooling == "token" and not backbone.use_class_token:
            raise ValueError(
                "`pooling='token'` needs a backbone with a class token. "
                "Received: a backbone with use_class_token=False"
            )
        if representation_dim is not None:
            check_int("representation_dim", representation_dim, 1)
        activation = as_keras_object(
            "activation", keras.activations.get, activation
        )
        dtype = backbone.dtype_policy
        head_dtype = dtype if head_dtype is None else as_dtype(head_dtype)
        inputs = backbone.inputs
        inputs = inputs[0] if len(inputs) == 1 else inputs
        x = _pooled(backbone, backbone(inputs), pooling, dtype)
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
        super().__init__(
            inputs=inputs,
            outputs=x,
            name=name or default_name("moe_image_classifier"),
            trainable=trainable,
        )
        self.backbone = backbone
        self.dtype_policy = dtype
        arguments = {
            "num_classes": num_classes,
            "pooling": pooling,
            "activation": keras.activations.serialize(activation),
            "dropout": dropout,
            "representation_dim": representation_dim,
            "head_dtype": keras.dtype_policies.serialize(head_dtype),
        }
        # A function, since Keras would save a plain attribute.
        self._arguments = lambda: dict(arguments)

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            **frozen_parts(self),
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            **self._arguments(),
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


def _pooled(backbone, x, pooling, dtype):
    if pooling == "token":
        return x[:, 0]
    if pooling == "gap":
        return ops.mean(x[:, int(backbone.use_class_token) :], axis=1)
    first = backbone.block(0)
    return AttentionPooling(
        first.num_heads,
        backbone.mlp_dim,
        qk_norm=first.qk_norm,
        layer_norm_epsilon=first.layer_norm_epsilon,
        dtype=dtype,
        name="pooling",
    )(x)
