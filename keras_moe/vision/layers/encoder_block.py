import keras
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.moe.part_arguments import as_layer
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.stacked import layer_copies
from keras_moe.vision.layers.attention import VisionAttention
from keras_moe.vision.layers.attention_pooling import head_dim
from keras_moe.vision.layers.feed_forward import as_feed_forward
from keras_moe.vision.layers.feed_forward import call_feed_forward
from keras_moe.vision.layers.feed_forward import members_of


@keras.saving.register_keras_serializable("keras_moe")
class EncoderBlock(keras.layers.Layer):
    """A block of a vision transformer around any feed-forward layer.

    ```
    x = x + attention(layer_norm(x))
    y = x + feed_forward(layer_norm(x))
    ```

    Args:
        num_heads: int. Attention heads; must divide the tokens' width.
        feed_forward: A layer from `(batch, tokens, D)` to the same shape, such
            as `keras_moe.layers.MoE` or `SoftMoE`. Or a list of such, for the
            members of an ensemble that share the attention: image `i` of the
            batch goes through layer `i % len(feed_forward)` (E3).
        qk_norm: bool. Whether each head normalizes queries and keys. Defaults
            to `False`.
        layer_norm_epsilon: float. Defaults to `1e-6`.
        dropout: float. Rate of the dropout after attention. Defaults to `0.0`.
        attention_dropout: float. Rate of the dropout of attention weights.
            Defaults to `0.0`.
        drop_path: float. Share of the images that skip a branch of the block,
            in training. Defaults to `0.0`.
        group_size: int, or `None`. The feed-forward layer is called with
            `(groups, group_size, D)`, tokens in the order of image and
            position, whatever image they are of (V-MoE). A last group that is
            not full is filled up with masked tokens, so the layer must take a
            mask. Members of an ensemble have groups of their own. Defaults to
            `None`, the images as they are.
        route_per: `"token"`, or `"image"`: the router of a `MoE` sees the mean
            over the tokens of an image in the place of each of them, so that
            they all go to the same experts (Mobile V-MoE). Defaults to
            `"token"`.
        token_mixer: A layer from `(batch, tokens, D)` to the same shape in the
            place of attention, such as attention in windows; `num_heads` is
            `None` then. Defaults to `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, tokens, D)`.
        context: int tensor of shape `(batch,)` or `(batch, tokens)`, or
            `None`. Ids, such as of tasks or modalities, for a router or a loss
            that uses a context.
        token_mask: bool tensor of shape `(batch, tokens)`, or `None`. Tokens
            that are `False` go to no expert. Attention does not read it.
        attention_mask: bool tensor of shape `(batch, tokens, tokens)`, or
            `None`. Which tokens (the second axis) read which (the third).
        router_condition: Tensor of shape `(batch, C)`, or `None`. A vector of
            each image that the router of a `MoE` sees beside each token.
        training: bool. Whether to apply dropout, noise and losses.

    Input shape:
        `(batch, tokens, D)`

    Output shape:
        Same as the input.

    Raises:
        ValueError: If an argument is out of range, `num_heads` does not divide
            `D`, or `feed_forward` cannot take what the arguments ask for.

    Example:

    >>> block = keras_moe.layers.EncoderBlock(
    ...     num_heads=2,
    ...     feed_forward=keras_moe.layers.MoE(4, intermediate_dim=8),
    ... )
    >>> tuple(block(keras.ops.ones((3, 5, 8))).shape)
    (3, 5, 8)

    Reference:

    - [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 2
    - [Allingham et al., 2021](https://arxiv.org/abs/2110.03360), section 4
      (members of an ensemble)
    """

    def __init__(
        self,
        num_heads,
        feed_forward,
        qk_norm=False,
        layer_norm_epsilon=1e-6,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        group_size=None,
        route_per="token",
        token_mixer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if token_mixer is None:
            check_int("num_heads", num_heads, 1)
        elif num_heads is not None or qk_norm or attention_dropout:
            raise ValueError(
                "`token_mixer` stands in the place of attention, whose "
                "arguments must be left out. Received: "
                f"token_mixer={token_mixer!r}, num_heads={num_heads!r}, "
                f"qk_norm={qk_norm!r}, attention_dropout={attention_dropout!r}"
            )
        check_bool("qk_norm", qk_norm)
        check_positive("layer_norm_epsilon", layer_norm_epsilon)
        check_rate("dropout", dropout)
        check_rate("attention_dropout", attention_dropout)
        check_rate("drop_path", drop_path)
        self.feed_forward = as_feed_forward(feed_forward, group_size, route_per)
        self.token_mixer = as_layer("token_mixer", token_mixer)
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        self.layer_norm_epsilon = layer_norm_epsilon
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.drop_path = drop_path
        self.group_size = group_size
        self.route_per = route_per
        self.attention_norm, self.feed_forward_norm = (
            self._norm(name) for name in ("attention_norm", "feed_forward_norm")
        )
        self._dropout = self._drop_path = None
        if dropout:
            self._dropout = keras.layers.Dropout(
                dropout, dtype=self.dtype_policy
            )
        if drop_path:
            self._drop_path = keras.layers.Dropout(
                drop_path, noise_shape=(None, 1, 1), dtype=self.dtype_policy
            )

    def _norm(self, name):
        return keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype_policy, name=name
        )

    @property
    def members(self):
        """The feed-forward layers, one without an ensemble."""
        return members_of(self.feed_forward)

    def build(
        self,
        inputs_shape,
        context_shape=None,
        token_mask_shape=None,
        attention_mask_shape=None,
        router_condition_shape=None,
    ):
        dim = inputs_shape[-1]
        if self.token_mixer is None:
            self.attention = VisionAttention(
                self.num_heads,
                head_dim(dim, self.num_heads),
                dropout=self.attention_dropout,
                qk_norm=self.qk_norm,
                qk_norm_epsilon=self.layer_norm_epsilon,
                dtype=self.dtype_policy,
                name="attention",
            )
            self.attention.build(inputs_shape, inputs_shape)
        else:
            layer_copies.build(
                self.token_mixer, inputs_shape, self.compute_dtype
            )
        self.attention_norm.build(inputs_shape)
        self.feed_forward_norm.build(inputs_shape)
        shape = (None, self.group_size or inputs_shape[1], dim)
        for layer in self.members:
            if router_condition_shape is not None:
                seen = (*shape[:-1], dim + router_condition_shape[-1])
                layer.build(shape, seen)
            layer_copies.build(layer, shape, self.compute_dtype)

    def call(
        self,
        inputs,
        context=None,
        token_mask=None,
        attention_mask=None,
        router_condition=None,
        training=None,
    ):
        x = self.attention_norm(inputs)
        x = self._mixed(x, attention_mask, training)
        inputs = self._join(inputs, x, training)
        x, seen = self.feed_forward_norm(inputs), None
        if router_condition is not None:
            seen = with_condition(x, router_condition)
        x = self._fed_forward(x, context, token_mask, seen, training)
        return self._join(inputs, x, training)

    def _fed_forward(self, x, context, token_mask, router_inputs, training):
        return call_feed_forward(
            self.feed_forward,
            x,
            self.group_size,
            self.route_per,
            context,
            token_mask,
            training,
            router_inputs,
        )

    def _join(self, inputs, x, training):
        if self._drop_path is not None:
            x = self._drop_path(x, training=training)
        # A part may have a dtype of its own, by a DTypePolicyMap.
        return inputs + ops.cast(x, inputs.dtype)

    def _mixed(self, x, attention_mask, training):
        if self.token_mixer is None:
            x = self.attention(
                x, x, attention_mask=attention_mask, training=training
            )
        elif attention_mask is None:
            x = self.token_mixer(x)
        else:
            raise ValueError(
                "`attention_mask` is for attention, not for a `token_mixer`. "
                f"Received both: token_mixer={self.token_mixer!r}"
            )
        if self._dropout is not None:
            x = self._dropout(x, training=training)
        return x

    def compute_output_shape(
        self,
        inputs_shape,
        context_shape=None,
        token_mask_shape=None,
        attention_mask_shape=None,
        router_condition_shape=None,
    ):
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "feed_forward": [serialize_part(layer) for layer in self.members]
            if isinstance(self.feed_forward, list)
            else serialize_part(self.feed_forward),
            "qk_norm": self.qk_norm,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "drop_path": self.drop_path,
            "group_size": self.group_size,
            "route_per": self.route_per,
            "token_mixer": serialize_part(self.token_mixer),
        }


def with_condition(x, condition):
    """Tokens `(B, N, D)` with a vector `(B, C)` beside: `(B, N, D + C)`."""
    shape = (*ops.shape(x)[:2], condition.shape[-1])
    condition = ops.cast(condition[:, None], x.dtype)
    return ops.concatenate([x, ops.broadcast_to(condition, shape)], axis=-1)
