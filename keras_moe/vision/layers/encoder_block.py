import inspect

import keras
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.moe.moe import MoE
from keras_moe.moe.part_arguments import as_layer
from keras_moe.moe.part_arguments import serialize_part
from keras_moe.stacked import layer_copies
from keras_moe.vision.layers.attention import VisionAttention
from keras_moe.vision.layers.attention_pooling import head_dim
from keras_moe.vision.layers.token_groups import from_groups
from keras_moe.vision.layers.token_groups import to_groups


@keras.saving.register_keras_serializable("keras_moe")
class EncoderBlock(keras.layers.Layer):
    """A block of a vision transformer around any feed-forward layer.

    ```
    x = x + attention(layer_norm(x))
    y = x + feed_forward(layer_norm(x))
    ```

    Args:
        num_heads: int. Attention heads; must divide the tokens' width. `None`
            with an `attention` of one's own.
        feed_forward: A layer from `(batch, tokens, D)` to the same shape, such
            as `keras_moe.layers.MoE` or `SoftMoE`.
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
            mask. Defaults to `None`, the images as they are.
        route_per: `"token"`, or `"image"`: the router of a `MoE` sees the mean
            over the tokens of an image in the place of each of them, so that
            they all go to the same experts (Mobile V-MoE). Defaults to
            `"token"`.
        attention: A layer from `(batch, tokens, D)` to the same shape, instead
            of attention that `num_heads`, `qk_norm` and `attention_dropout`
            describe, such as `keras_moe.layers.MixtureOfHeads`. Defaults to
            `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, tokens, D)`.
        context: int tensor of shape `(batch,)`, or `None`. Ids, such as of
            tasks, for a router that uses a context.
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
    """

    def __init__(
        self,
        num_heads=None,
        feed_forward=None,
        qk_norm=False,
        layer_norm_epsilon=1e-6,
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        group_size=None,
        route_per="token",
        attention=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self._has_own_attention = attention is not None
        if self._has_own_attention:
            check_own_attention(num_heads, qk_norm, attention_dropout)
            self.attention = as_layer("attention", attention)
        else:
            check_int("num_heads", num_heads, 1)
        check_bool("qk_norm", qk_norm)
        check_positive("layer_norm_epsilon", layer_norm_epsilon)
        check_rate("dropout", dropout)
        check_rate("attention_dropout", attention_dropout)
        check_rate("drop_path", drop_path)
        check_one_of("route_per", route_per, ("token", "image"))
        if group_size is not None:
            check_int("group_size", group_size, 1)
        if feed_forward is None:
            raise ValueError(
                "`feed_forward` must be a layer. Received: feed_forward=None"
            )
        self.feed_forward = as_layer("feed_forward", feed_forward)
        takes = inspect.signature(self.feed_forward.call).parameters
        if group_size is not None and "mask" not in takes:
            raise ValueError(
                "With `group_size`, `feed_forward` must take a mask. "
                f"Received: feed_forward={self.feed_forward!r}"
            )
        if route_per == "image" and "router_inputs" not in takes:
            raise ValueError(
                "With `route_per='image'`, `feed_forward` must be a MoE. "
                f"Received: feed_forward={self.feed_forward!r}"
            )
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

    def build(
        self, inputs_shape, context_shape=None, router_condition_shape=None
    ):
        dim = inputs_shape[-1]
        self.attention_norm.build(inputs_shape)
        if self._has_own_attention:
            layer_copies.build(self.attention, inputs_shape, self.compute_dtype)
        else:
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
        self.feed_forward_norm.build(inputs_shape)
        shape = (None, self.group_size or inputs_shape[1], dim)
        if router_condition_shape is not None:
            seen = (*shape[:-1], dim + router_condition_shape[-1])
            self.feed_forward.build(shape, seen)
        layer_copies.build(self.feed_forward, shape, self.compute_dtype)

    def call(self, inputs, context=None, router_condition=None, training=None):
        x = self._attend(self.attention_norm(inputs), training)
        inputs = self._join(inputs, x, training)
        x, kwargs = self.feed_forward_norm(inputs), {}
        if router_condition is not None:
            kwargs["router_inputs"] = with_condition(x, router_condition)
        x = self._feed_forward(x, context, training, **kwargs)
        return self._join(inputs, x, training)

    def _attend(self, x, training):
        if self._has_own_attention:
            x = self.attention(x)  # Keras passes `training` on by itself.
        else:
            x = self.attention(x, x, training=training)
        if self._dropout is not None:
            x = self._dropout(x, training=training)
        return x

    def _join(self, inputs, x, training):
        if self._drop_path is not None:
            x = self._drop_path(x, training=training)
        # A part may have a dtype of its own, by a DTypePolicyMap.
        return inputs + ops.cast(x, inputs.dtype)

    def _feed_forward(self, x, context, training, **kwargs):
        """The feed-forward layer, with arguments `(batch, tokens, ...)`."""
        batch, tokens, dim = ops.shape(x)
        if context is not None:
            context = ops.expand_dims(context, -1)
            kwargs["context"] = ops.broadcast_to(context, (batch, tokens))
        if self.route_per == "image":
            seen = kwargs.get("router_inputs", x)
            mean = ops.mean(seen, axis=1, keepdims=True)
            kwargs["router_inputs"] = ops.broadcast_to(mean, ops.shape(seen))
        # Keras passes `training` on by itself.
        if self.group_size in (None, tokens) or not self._groups_count(
            training
        ):
            return self.feed_forward(x, **kwargs)
        groups = {
            name: to_groups(value, self.group_size)
            for name, value in (("inputs", x), *kwargs.items())
        }
        x, mask = groups.pop("inputs")
        kwargs = {name: value for name, (value, _) in groups.items()}
        x = self.feed_forward(x, mask=mask, **kwargs)
        return from_groups(x, (batch, tokens, dim))

    def _groups_count(self, training):
        """Whether what a token gets depends on its group."""
        layer = self.feed_forward
        if training or not isinstance(layer, MoE):
            return True
        return layer.capacity.limits(training=False) or layer.router.looks_ahead

    def compute_output_shape(self, inputs_shape, *other_shapes):
        return tuple(inputs_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "feed_forward": serialize_part(self.feed_forward),
            "qk_norm": self.qk_norm,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "drop_path": self.drop_path,
            "group_size": self.group_size,
            "route_per": self.route_per,
            "attention": serialize_part(
                self.attention if self._has_own_attention else None
            ),
        }


def with_condition(x, condition):
    """Tokens `(B, N, D)` with a vector `(B, C)` beside: `(B, N, D + C)`."""
    shape = (*ops.shape(x)[:2], condition.shape[-1])
    condition = ops.cast(condition[:, None], x.dtype)
    return ops.concatenate([x, ops.broadcast_to(condition, shape)], axis=-1)


def check_own_attention(num_heads, qk_norm, attention_dropout):
    """Raises if attention of one's own and arguments for ours are given."""
    given = {
        "num_heads": num_heads,
        "qk_norm": qk_norm,
        "attention_dropout": attention_dropout,
    }
    given = {name: value for name, value in given.items() if value}
    if given:
        raise ValueError(
            "With `attention`, a layer of one's own, there must be no "
            f"{', '.join(f'`{name}`' for name in given)}. Received: {given}"
        )
