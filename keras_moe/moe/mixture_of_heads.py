import keras
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import is_int
from keras_moe.moe import part_arguments as parts
from keras_moe.moe.routed_layer import RoutedLayer
from keras_moe.ops.routing import expert_counts
from keras_moe.routers import get as get_router


@keras.saving.register_keras_serializable("keras_moe")
class MixtureOfHeads(RoutedLayer):
    """Self-attention whose heads are experts (MoH).

    ```
    heads   = attention of each head                     before the output
    routed  = weights of the chosen heads, which sum to `top_k`, else 0
    shared  = num_shared_heads * softmax(x @ shared_kernel)       1 for one head
    a, b    = 2 * softmax(x @ mix_kernel)
    y       = sum over heads of ([a * shared, b * routed] * heads) @ kernel
    ```

    Without shared heads, `routed` alone weighs the heads. The shared heads
    stand before the routed ones.

    A token has a weight for each head, instead of 1 in plain attention; on
    average they are 1 over the heads that it has. All heads are computed for
    all tokens, so that a layer costs as much as plain attention.

    Only in training, the balancing losses are added to the model's loss, and
    the routing is counted and shown in the logs of `fit`. With `top_k=1` only
    the losses train the router, as the weight is always 1.

    Args:
        num_heads: int. All heads, shared ones included.
        key_dim: int. Width of each head's queries, keys and values.
        top_k: int. Routed heads that a token has, if `router` is a name.
            Defaults to `None`, what the router has by default, 2 for `"top_k"`.
        num_shared_heads: int. Heads that every token has. Defaults to `0`.
        router: A name of `keras_moe.routers.get` or a router of
            `num_heads - num_shared_heads` experts. `DenseRouter` weighs all of
            them. Defaults to `"top_k"`.
        losses: As for `keras_moe.layers.MoE`. The one of MoH is
            `LoadBalancingLoss(1e-2, normalize_by_top_k=False)`. Defaults to
            `"default"`.
        use_bias: bool. Whether queries, keys, values and outputs have a bias.
            Defaults to `True`.
        statistics: As for `keras_moe.layers.MoE`. Defaults to `"auto"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, tokens, D)`.
        mask: Boolean tensor of shape `(batch, tokens)`, or `None`. Nothing
            attends to masked tokens, and they are not routed.
        training: bool. Whether to add losses, count and apply noise.

    Input shape:
        `(batch, tokens, D)`

    Output shape:
        Same as the input.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> layer = keras_moe.layers.MixtureOfHeads(
    ...     num_heads=8, key_dim=4, top_k=3, num_shared_heads=2
    ... )
    >>> tuple(layer(keras.ops.ones((2, 5, 16))).shape)
    (2, 5, 16)

    In a block of a vision transformer:

    >>> block = keras_moe.layers.EncoderBlock(
    ...     num_heads=None,
    ...     feed_forward=keras_moe.layers.MoE(4, intermediate_dim=8),
    ...     token_mixer=keras_moe.layers.MixtureOfHeads(num_heads=4, key_dim=4),
    ... )
    >>> tuple(block(keras.ops.ones((2, 5, 16))).shape)
    (2, 5, 16)

    Reference:

    - [Jin et al., 2024](https://arxiv.org/abs/2410.11842), equations 5 to 8
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        top_k=None,
        num_shared_heads=0,
        router="top_k",
        losses="default",
        use_bias=True,
        statistics="auto",
        **kwargs,
    ):
        check_int("num_heads", num_heads, 1)
        check_int("key_dim", key_dim, 1)
        check_bool("use_bias", use_bias)
        if not is_int(num_shared_heads) or not (
            0 <= num_shared_heads < num_heads
        ):
            raise ValueError(
                "`num_shared_heads` must be an int of at least 0, and below "
                f"`num_heads`. Received: num_shared_heads={num_shared_heads!r},"
                f" num_heads={num_heads}"
            )
        number = num_heads - num_shared_heads
        router = parts.resolve_part(
            get_router,
            "router",
            router,
            {
                "num_experts": number,
                "dtype": kwargs.get("dtype"),
                "name": "router",
            },
            {"top_k": top_k},
        )
        if getattr(router, "num_experts", None) != number:
            raise ValueError(
                "`router` must have `num_heads - num_shared_heads` experts. "
                f"Received: num_heads={num_heads}, "
                f"num_shared_heads={num_shared_heads}, router={router!r}"
            )
        super().__init__(router, losses, "token", False, False, **kwargs)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.num_shared_heads = num_shared_heads
        self.use_bias = use_bias
        # Its projections are used one by one.
        self.attention = keras.layers.MultiHeadAttention(
            num_heads,
            key_dim,
            use_bias=use_bias,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.add_statistics(statistics, may_drop=False)

    def build(self, inputs_shape):
        if len(inputs_shape) != 3:
            raise ValueError(
                "The input of MixtureOfHeads must be of shape (batch, tokens, "
                f"D). Received: inputs_shape={tuple(inputs_shape)}"
            )
        self.build_routing(inputs_shape)
        self.attention.build(inputs_shape, inputs_shape)
        self.shared_kernel = self.mix_kernel = None
        dim = inputs_shape[-1]
        if self.num_shared_heads > 1:
            self.shared_kernel = self._add_kernel(
                "shared_kernel", dim, self.num_shared_heads
            )
        if self.num_shared_heads:
            self.mix_kernel = self._add_kernel("mix_kernel", dim, 2)

    def _add_kernel(self, name, dim, width):
        return self.add_weight(
            name=name, shape=(dim, width), initializer="glorot_uniform"
        )

    def call(self, inputs, mask=None, training=None):
        tokens = self.to_tokens(inputs, mask, None, None)
        routing = self.routing_of(tokens, training)
        gates = self._gates(
            tokens.features, self.watched(routing, training)
        )  # (T, heads)
        inputs = ops.cast(inputs, self.compute_dtype)
        layer, mask_of_keys = self.attention, None
        if mask is not None:
            mask = ops.cast(mask, "bool")
            # Without any key, attention would be NaN on PyTorch.
            none = ops.logical_not(ops.any(mask, axis=1, keepdims=True))
            mask_of_keys = ops.logical_or(mask, none)[:, None, None, :]
        heads = ops.dot_product_attention(
            layer.query_dense(inputs),
            layer.key_dense(inputs),
            layer.value_dense(inputs),
            mask=mask_of_keys,
        )  # (batch, tokens, heads, key_dim)
        gates = ops.reshape(gates, (*tokens.positions, self.num_heads, 1))
        outputs = layer.output_dense(heads * ops.cast(gates, heads.dtype))
        if training:
            counts = expert_counts(routing, self.num_experts, tokens.mask)
            self.count(routing, tokens, counts)
        return outputs

    def _gates(self, features, routing):
        """The weight of every head for each token, `(T, heads)` float32."""
        weights = ops.cast(routing.expert_weights, "float32")
        chosen = ops.one_hot(
            routing.expert_indices, self.num_experts, dtype="float32"
        )  # (T, K, E)
        total = ops.sum(weights, axis=-1, keepdims=True)
        weights = weights / ops.maximum(total, 1e-20)
        routed = ops.einsum("tk,tke->te", weights, chosen) * weights.shape[-1]
        if not self.num_shared_heads:
            return routed
        features = ops.cast(features, "float32")
        mix = 2 * _weights(features, self.mix_kernel)
        shared = ops.ones_like(mix[:, :1])
        if self.shared_kernel is not None:
            shared = self.num_shared_heads * _weights(
                features, self.shared_kernel
            )
        return ops.concatenate(
            [mix[:, :1] * shared, mix[:, 1:] * routed], axis=-1
        )

    def compute_output_spec(self, inputs, mask=None, training=None):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def compute_output_shape(self, inputs_shape):
        return tuple(inputs_shape)

    def get_config(self):
        config = super().get_config()
        for name in ("route_per", "causal", "return_routing"):
            del config[name]
        return {
            **config,
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "num_shared_heads": self.num_shared_heads,
            "use_bias": self.use_bias,
        }


def _weights(features, kernel):
    """`softmax(features @ kernel)`."""
    kernel = ops.cast(kernel, "float32")
    return ops.softmax(ops.einsum("td,de->te", features, kernel))
