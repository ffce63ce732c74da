import functools
import math

import keras
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.distribution.sending import apply_to_tokens
from keras_moe.moe import part_arguments as parts
from keras_moe.moe.foreign_parts import as_experts
from keras_moe.moe.foreign_parts import output_shape_of
from keras_moe.moe.tokens import flatten_mask
from keras_moe.routers.soft_router import SoftRouter


@keras.saving.register_keras_serializable("keras_moe")
class SoftMoE(keras.layers.Layer):
    """A mixture of experts that mixes tokens instead of choosing experts.

    It replaces a feed-forward block, and all of it has gradients.

    ```
    dispatch, combine = router(tokens of an example)
    slots[e, p] = sum over l of dispatch[l, e, p] * tokens[l]
    y[l]        = sum over e, p of combine[l, e, p] * experts[e](slots[e, p])
    ```

    Each expert computes `slots_per_expert` rows for each example, for any
    number of tokens: an example costs as much as `num_experts *
    slots_per_expert` tokens. No token is dropped, no expert stays unused and no
    balancing loss is needed. The paper uses about as many slots as tokens.

    Each output depends on all tokens of its example, also later ones. Use it
    for vision and encoders, not for a model that predicts the next token.
    Examples of a batch do not affect each other.

    Masked tokens give zero, and do not affect the others.

    Args:
        num_experts: int. Number of experts. Required unless `router` or
            `experts` is an object.
        intermediate_dim: int. Width of each expert's hidden layer. Required if
            `experts` is a name.
        slots_per_expert: int. Slots of each expert for an example, if `router`
            is a name. Defaults to `1`.
        activation: Activation of the experts, if `experts` is a name. Defaults
            to what the experts have by default, `"silu"` for `"glu"`.
        router: `"soft"` or a `keras_moe.routers.SoftRouter`. Defaults to
            `"soft"`.
        experts: `"glu"`, `"mlp"` or a layer with `num_experts` that is called
            as `experts(rows, group_sizes)`; its rows may be wider or narrower
            than the tokens. Defaults to `"glu"`.
        causal: bool. Whether an output may depend on earlier tokens alone.
            `True` is refused, as the layer cannot do it, unless the router has
            `allow_lookahead=True`. Defaults to `False`.
        **kwargs: Arguments of the experts, if `experts` is a name (`dropout`,
            `use_bias`, `kernel_initializer`, ...), and of
            `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape `(batch, ..., dim)`. All positions of an example
            are its tokens.
        mask: Boolean tensor of shape `(batch, ...)`, or of its first axes.
            `False` tokens are masked.
        training: bool. Whether to apply noise and dropout.

    Input shape:
        `(batch, ..., dim)`, of rank 3 or more.

    Output shape:
        Same as the input, with the width of the experts' rows as the last axis.

    Raises:
        ValueError: If arguments are out of range or do not fit together.

    Example:

    >>> layer = keras_moe.layers.SoftMoE(num_experts=8, intermediate_dim=32)
    >>> tuple(layer(keras.ops.ones((2, 5, 16))).shape)
    (2, 5, 16)

    Reference:

    - [Puigcerver et al., 2023](https://arxiv.org/abs/2308.00951), section 2
    """

    def __init__(
        self,
        num_experts=None,
        intermediate_dim=None,
        slots_per_expert=None,
        activation=None,
        router="soft",
        experts="glu",
        causal=False,
        *,
        name=None,
        **kwargs,
    ):
        of_experts, kwargs = parts.split_arguments("SoftMoE", kwargs, experts)
        super().__init__(name=name or parts.default_name("soft_moe"), **kwargs)
        self.router, experts = parts.router_and_experts(
            router,
            experts,
            num_experts,
            self.dtype_policy,
            {"slots_per_expert": slots_per_expert},
            {
                "intermediate_dim": intermediate_dim,
                "activation": activation,
                **of_experts,
            },
            get_router=_get_router,
        )
        self.experts = as_experts(experts)
        self.num_experts = self.experts.num_experts
        check_bool("causal", causal)
        if causal and not self.router.allow_lookahead:
            raise ValueError(
                "SoftMoE cannot be causal: its slots mix all tokens of an "
                "example, so that each output depends on later tokens. Use "
                "`keras_moe.layers.MoE`, or, where only whole sequences are "
                "scored, a SoftRouter with `allow_lookahead=True`. "
                f"Received: causal={causal}"
            )
        self.causal = causal
        self.supports_masking = True

    def build(self, input_shape):
        if len(input_shape) < 3 or input_shape[-1] is None:
            raise ValueError(
                "The input of SoftMoE must be of shape (batch, ..., dim), of "
                "rank 3 or more, with a static dim. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        dim = input_shape[-1]
        self.input_spec = keras.layers.InputSpec(min_ndim=3, axes={-1: dim})
        if not self.router.built:
            self.router.build((None, None, dim))
        if not self.experts.built:
            self.experts.build((None, dim))

    def call(self, inputs, mask=None, training=None):
        routing = self._route(inputs, mask, training)
        # In the router's float32, the products as well as the sums.
        slots = ops.einsum(
            "blep,bld->bepd", routing.dispatch_weights, routing.inputs
        )
        results = apply_to_tokens(
            self.experts,
            functools.partial(_by_expert, training=training),
            ops.cast(slots, self.compute_dtype),
        )
        width = results.shape[-1]
        if width != self._width(slots.shape[-1]):
            raise ValueError(
                "`experts` must return rows of the width that its "
                f"`compute_output_shape` says. Received width {width}, said "
                f"{self._width(slots.shape[-1])}"
            )
        outputs = ops.einsum(
            "blep,bepd->bld",
            routing.combine_weights,
            ops.cast(results, routing.combine_weights.dtype),
        )
        return ops.reshape(
            ops.cast(outputs, self.compute_dtype),
            (*ops.shape(inputs)[:-1], width),
        )

    def route(self, inputs, mask=None, training=False):
        """The weights with which the layer mixes the given inputs.

        Args:
            inputs: Tensor of shape `(batch, ..., dim)`.
            mask: Boolean tensor of shape `(batch, ...)`, or `None`.
            training: bool. Whether the router applies noise.

        Returns:
            A `keras_moe.routers.SoftRouting`, whose `L` tokens are the
            positions of an example in the order of
            `reshape(inputs, (batch, -1, dim))`.
        """
        inputs = ops.convert_to_tensor(inputs)
        if not self.built:
            self.build(inputs.shape)
        return self._route(inputs, mask, training)

    def _route(self, inputs, mask, training):
        inputs = ops.cast(inputs, self.compute_dtype)
        *positions, dim = ops.shape(inputs)
        flat = (positions[0], math.prod(positions[1:]))  # (B, L)
        if mask is not None:
            mask = ops.reshape(flatten_mask(mask, positions), flat)
        tokens = ops.reshape(inputs, (*flat, dim))
        return self.router(tokens, mask=mask, training=training)

    def _width(self, dim):
        return output_shape_of(self.experts, (None, dim))[-1]

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self._width(input_shape[-1]))

    def get_config(self):
        return {
            **super().get_config(),
            "router": parts.serialize_part(self.router),
            "experts": parts.serialize_part(self.experts),
            "causal": self.causal,
        }


def _by_expert(experts, slots, training):
    """Each expert's results for its slots, `(B, E, P, D)`."""
    batch, num_experts, num_slots, dim = ops.shape(slots)
    rows = experts(
        ops.reshape(ops.transpose(slots, (1, 0, 2, 3)), (-1, dim)),
        ops.zeros((num_experts,), "int32") + batch * num_slots,
        training=training,
    )
    rows = ops.reshape(rows, (num_experts, batch, num_slots, rows.shape[-1]))
    return ops.transpose(rows, (1, 0, 2, 3))


def _get_router(identifier, **kwargs):
    router = identifier
    if identifier == "soft":
        router = SoftRouter(**kwargs)
    elif isinstance(identifier, dict):
        router = keras.saving.deserialize_keras_object(identifier)
    if not isinstance(router, SoftRouter):
        raise ValueError(
            "`router` must be 'soft' or a SoftRouter. "
            f"Received: router={identifier!r}"
        )
    return router
