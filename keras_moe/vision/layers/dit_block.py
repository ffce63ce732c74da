import keras
from keras import ops

from keras_moe.checks import check_one_of
from keras_moe.vision.layers.encoder_block import EncoderBlock
from keras_moe.vision.layers.encoder_block import with_condition
from keras_moe.vision.layers.feed_forward import takes

ROUTER_INPUTS = ("modulated", "unmodulated", "unmodulated_and_condition")


@keras.saving.register_keras_serializable("keras_moe")
class DiTBlock(EncoderBlock):
    """A block of a diffusion transformer around any feed-forward layer.

    ```
    s1, c1, g1, s2, c2, g2 = split(silu(condition) @ kernel + bias)
    x = x + g1 * attention(norm(x) * (1 + c1) + s1)
    y = x + g2 * feed_forward(norm(x) * (1 + c2) + s2)
    ```

    `norm` has neither gain nor bias. The kernel and the bias start with zeros,
    so that a new block gives what it gets (adaLN-Zero).

    Args:
        num_heads: int. Attention heads; must divide the tokens' width. `None`
            with a `token_mixer`.
        feed_forward: A layer from `(batch, tokens, D)` to the same shape, such
            as `keras_moe.layers.MoE`.
        router_inputs: What the router of a `MoE` sees: `"modulated"` what the
            experts get, which tells it the time and the class (DiT-MoE,
            EC-DiT); `"unmodulated"` the tokens `norm(x)`;
            `"unmodulated_and_condition"` these with the condition beside them,
            `(batch, tokens, D + condition's width)`. Defaults to `"modulated"`.
        **kwargs: Arguments of `keras_moe.layers.EncoderBlock`.

    Call arguments:
        inputs: Tensor of shape `(batch, tokens, D)`.
        condition: Tensor of shape `(batch, C)`, a vector of the time and the
            class of each image.
        context, token_mask, attention_mask: As for `EncoderBlock`.
        training: bool. Whether to apply dropout, noise and losses.

    Input shape:
        `(batch, tokens, D)` and `(batch, C)`

    Output shape:
        `(batch, tokens, D)`

    Raises:
        ValueError: If an argument is out of range, `num_heads` does not divide
            `D`, or `feed_forward` cannot take what the arguments ask for.

    Example:

    >>> block = keras_moe.layers.DiTBlock(
    ...     num_heads=2,
    ...     feed_forward=keras_moe.layers.MoE(4, intermediate_dim=8),
    ... )
    >>> x, condition = keras.ops.ones((3, 5, 8)), keras.ops.ones((3, 6))
    >>> tuple(block(x, condition).shape)
    (3, 5, 8)

    Reference:

    - [Peebles and Xie, 2022](https://arxiv.org/abs/2212.09748), section 3.2
    - [Fei et al., 2024](https://arxiv.org/abs/2407.11633), section 2 (DiT-MoE)
    """

    def __init__(
        self,
        num_heads=None,
        feed_forward=None,
        router_inputs="modulated",
        **kwargs,
    ):
        super().__init__(num_heads, feed_forward, **kwargs)
        check_one_of("router_inputs", router_inputs, ROUTER_INPUTS)
        for layer in self.members if router_inputs != "modulated" else ():
            if not takes(layer, "router_inputs"):
                raise ValueError(
                    f"With `router_inputs={router_inputs!r}`, `feed_forward` "
                    f"must be a MoE. Received: feed_forward={layer!r}"
                )
        self.router_inputs = router_inputs

    def _norm(self, name):
        return plain_norm(self.layer_norm_epsilon, self.dtype_policy, name)

    def build(
        self,
        inputs_shape,
        condition_shape,
        context_shape=None,
        token_mask_shape=None,
        attention_mask_shape=None,
    ):
        if len(condition_shape) != 2:
            raise ValueError(
                "`condition` must be of shape (batch, C). Received: "
                f"condition.shape={tuple(condition_shape)}"
            )
        seen = self.router_inputs == "unmodulated_and_condition"
        super().build(
            inputs_shape,
            router_condition_shape=condition_shape if seen else None,
        )
        self.modulation = modulation(6 * inputs_shape[-1], self.dtype_policy)
        self.modulation.build(condition_shape)

    def call(
        self,
        inputs,
        condition,
        context=None,
        token_mask=None,
        attention_mask=None,
        training=None,
    ):
        shift, scale, gate, *of_feed_forward = modulation_parts(
            self.modulation, condition, 6
        )
        x = self.attention_norm(inputs) * (1 + scale) + shift
        x = gate * self._mixed(x, attention_mask, training)
        inputs = self._join(inputs, x, training)
        shift, scale, gate = of_feed_forward
        plain = self.feed_forward_norm(inputs)
        x = self._fed_forward(
            plain * (1 + scale) + shift,
            context,
            token_mask,
            self._seen_by_router(plain, condition),
            training,
        )
        return self._join(inputs, gate * ops.cast(x, gate.dtype), training)

    def _seen_by_router(self, plain, condition):
        if self.router_inputs == "modulated":
            return None
        if self.router_inputs == "unmodulated":
            return plain
        return with_condition(plain, condition)

    def compute_output_shape(self, inputs_shape, *other_shapes):
        return tuple(inputs_shape)

    def get_config(self):
        return {**super().get_config(), "router_inputs": self.router_inputs}


def plain_norm(epsilon, dtype, name):
    """A layer norm whose gain and bias come from the condition."""
    return keras.layers.LayerNormalization(
        epsilon=epsilon, center=False, scale=False, dtype=dtype, name=name
    )


def modulation(width, dtype):
    """From a condition to shifts, scales and gates; zeros at first."""
    return keras.layers.Dense(
        width, kernel_initializer="zeros", dtype=dtype, name="modulation"
    )


def modulation_parts(layer, condition, number):
    """Shifts, scales and gates `(batch, 1, D)` of a `modulation`."""
    parts = layer(ops.silu(condition))
    return ops.split(parts[:, None], number, axis=-1)
