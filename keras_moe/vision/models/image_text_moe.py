import math

import keras

from keras_moe.checks import check_int
from keras_moe.moe.model_config import deserialized
from keras_moe.moe.model_config import made_again
from keras_moe.moe.part_arguments import default_name
from keras_moe.vision.layers.contrastive_head import unit
from keras_moe.vision.models.image_backbone import as_dtype
from keras_moe.vision.models.image_backbone import as_image_shape
from keras_moe.vision.models.image_backbone import frozen_parts
from keras_moe.vision.models.image_text_parts import encoded
from keras_moe.vision.models.image_text_parts import image_text_parts
from keras_moe.vision.models.presets import Presets
from keras_moe.vision.models.vision_backbone import check_encoder


@keras.saving.register_keras_serializable("keras_moe")
class ImageTextMoE(Presets, keras.Model):
    """One tower with experts for images and texts, which learns to pair them.

    ```
    x = [patches of the image @ kernel + bias + positions,
         embeddings of the text's ids + positions]
    for each block:
        x = x + attention(layer_norm(x))        within each modality
        x = x + MoE(layer_norm(x))              or a dense feed-forward
    x      = layer_norm(x)
    images = unit(mean of the image's tokens @ image kernel + bias)
    texts  = unit(mean of the text's tokens @ text kernel + bias)
    ```

    Attention, experts and dense layers are the same for both modalities. In
    training the tokens of both compete for the same experts. `fit` needs no
    labels, as in `model.fit({"images": images, "texts": texts})`: image `i` and
    text `i` belong together, and `keras_moe.layers.ContrastiveHead` adds its
    loss. So do, in training, losses on the entropy of the router's
    probabilities p, without which the experts of the smaller modality starve:

    ```
    local loss  = mean over the modality's tokens of H(p)
    global loss = -H(mean of p)     or max(0, log(min_experts) - H(mean of p))
    ```

    In inference nothing is dropped, unless `eval_capacity_factor` is given, and
    each image and text is on its own; not so with a router that `looks_ahead`.

    Args:
        image_shape: Three ints, in the order of `data_format`.
        patch_size: int, or two; must divide the images.
        vocabulary_size: int. Number of the ids of texts.
        text_length: int. Ids of a text, the padding included.
        num_layers, num_heads, hidden_dim, mlp_dim: As for
            `keras_moe.models.VMoEBackbone`.
        projection_dim: int. Width of the outputs. Defaults to `None`,
            `hidden_dim`.
        padding_id: int, or `None`. The id that fills texts up; such tokens are
            not read and go to no expert. Defaults to `0`.
        num_experts: int, or a list of ints. Defaults to `32`.
        moe_layers: As for `VMoEBackbone`. Defaults to `"every_2"`.
        router, top_k, router_noise, capacity_factor, eval_capacity_factor,
            capacity_multiple_of, drop_policy: As for `VMoEBackbone`, but that
            `"v_moe"` has one expert per token, and that
            `drop_policy="priority"`, without which training is not stable. The
            context of a router is the modality, 0 for images and 1 for texts.
        image_local_weight, text_local_weight: floats. Weights of the local
            losses. Default to `0.0` and `1e-2`.
        image_global_weight, text_global_weight: floats. Weights of the global
            losses. Default to `1e-2`.
        min_image_experts, min_text_experts: floats, or `None`. The number of
            experts that a modality should use at least. Default to `None`, as
            many as there are.
        importance_loss_weight, load_loss_weight, load_balancing_loss_weight,
            losses, num_shared_experts: As for `VMoEBackbone`.
        contrastive_loss: `"softmax"` or `"sigmoid"`, as for `ContrastiveHead`.
            Defaults to `"softmax"`.
        activation, expert_dropout, dropout, attention_dropout, drop_path,
            positions, qk_norm, layer_norm_epsilon, data_format, dtype,
            **kwargs: As for `VMoEBackbone`.

    Call arguments:
        inputs: Dict of `"images"` and `"texts"`.

    Input shape:
        `(batch, *image_shape)` and `(batch, text_length)`, whole numbers.

    Output shape:
        Dict of `"images"` and `"texts"`, `(batch, projection_dim)` each. The
        models `image_encoder()` and `text_encoder()` give one of them.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> model = keras_moe.models.ImageTextMoE(
    ...     image_shape=(16, 16, 3), patch_size=8, vocabulary_size=20,
    ...     text_length=6, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16,
    ...     num_experts=4,
    ... )
    >>> outputs = model(
    ...     {"images": np.zeros((3, 16, 16, 3)), "texts": np.ones((3, 6))})
    >>> tuple(outputs["texts"].shape)
    (3, 8)
    >>> tuple(model.head.logits(outputs["images"], outputs["texts"]).shape)
    (3, 3)

    Reference:

    - [Mustafa et al., 2022](https://arxiv.org/abs/2206.02770), sections 2 and 3
    """

    def __init__(
        self,
        image_shape,
        patch_size,
        vocabulary_size,
        text_length,
        num_layers,
        num_heads,
        hidden_dim,
        mlp_dim,
        projection_dim=None,
        padding_id=0,
        num_experts=32,
        moe_layers="every_2",
        router="v_moe",
        top_k=None,
        router_noise=None,
        capacity_factor=1.05,
        eval_capacity_factor=math.inf,
        capacity_multiple_of=4,
        drop_policy="priority",
        image_local_weight=0.0,
        text_local_weight=1e-2,
        image_global_weight=1e-2,
        text_global_weight=1e-2,
        min_image_experts=None,
        min_text_experts=None,
        importance_loss_weight=5e-3,
        load_loss_weight=5e-3,
        load_balancing_loss_weight=0.0,
        losses=None,
        num_shared_experts=0,
        contrastive_loss="softmax",
        activation="gelu_tanh",
        expert_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        positions="learned",
        qk_norm=False,
        layer_norm_epsilon=1e-6,
        data_format=None,
        dtype=None,
        *,
        name=None,
        trainable=True,
    ):
        a = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in locals().items()
            if key not in ("self", "name", "trainable", "__class__")
        }
        check_int("num_layers", num_layers, 1)
        check_int("num_shared_experts", num_shared_experts, 0)
        check_int("text_length", text_length, 1)
        if padding_id is not None:
            check_int("padding_id", padding_id, 0)
        if projection_dim is not None:
            check_int("projection_dim", projection_dim, 1)
        dtype = a["dtype"] = as_dtype(dtype)
        check_encoder(a)
        parts = image_text_parts(a)
        images = keras.Input(as_image_shape(image_shape), name="images")
        texts = keras.Input((text_length,), dtype="int32", name="texts")
        units = parts["head"](*encoded(a, parts, images, texts))
        super().__init__(
            inputs={"images": images, "texts": texts},
            outputs=dict(zip(("images", "texts"), units, strict=True)),
            name=name or default_name("image_text_moe"),
            trainable=trainable,
        )
        a["data_format"] = parts["image_embedding"].data_format
        # Functions, since Keras would save plain attributes.
        self._arguments = lambda: dict(a)
        self._parts = lambda: parts
        self.dtype_policy = dtype

    @property
    def head(self):
        """The `keras_moe.layers.ContrastiveHead`."""
        return self.get_layer("head")

    def image_encoder(self):
        """A model from images to their vectors, with the layers of this one."""
        images = keras.Input(self.input["images"].shape[1:], name="images")
        vectors = encoded(self._arguments(), self._parts(), images, None)
        return keras.Model(images, unit(vectors[0]), name="image_encoder")

    def text_encoder(self):
        """A model from texts to their vectors, with the layers of this one."""
        shape = self.input["texts"].shape[1:]
        texts = keras.Input(shape, dtype="int32", name="texts")
        vectors = encoded(self._arguments(), self._parts(), None, texts)
        return keras.Model(texts, unit(vectors[0]), name="text_encoder")

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            **frozen_parts(self),
            **self._arguments(),
            "dtype": keras.dtype_policies.serialize(self._arguments()["dtype"]),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return made_again(cls, *deserialized(config, custom_objects))
