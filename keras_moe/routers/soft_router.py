from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_at_least
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.checks import check_seed
from keras_moe.ops.noise import with_noise
from keras_moe.ops.scores import softmax
from keras_moe.routers.normalizations import l2_normalized
from keras_moe.routers.normalizations import rms_normalized
from keras_moe.routers.router import Router

_NORMALIZATIONS = ("l2", "rms", "layer")


class SoftRouting(NamedTuple):
    """What a `SoftRouter` decided: what slots are mixed from, and into what.

    ```
    slots[b, e, p]   = sum over l of dispatch_weights[b, l, e, p] * inputs[b, l]
    outputs[b, l]    = sum over e, p of combine_weights[b, l, e, p]
                                        * experts[e](slots[b, e, p])
    ```

    With `P` slots an expert. Masked tokens have only weights of zero.

    Fields:
        logits: `(B, L, E, P)`. Raw scores, before any noise.
        dispatch_weights: `(B, L, E, P)`. Sum to one over the tokens.
        combine_weights: `(B, L, E, P)`. Sum to one over all slots.
        inputs: `(B, L, D)`. What the slots are mixed from: the tokens, or the
            normalized tokens. Zero where masked.
    """

    logits: Any
    dispatch_weights: Any
    combine_weights: Any
    inputs: Any


@keras.saving.register_keras_serializable("keras_moe")
class SoftRouter(Router):
    """Mixes the tokens of an example into slots, and back, for `SoftMoE`.

    ```
    logits  = scale * l2_normalize(tokens) @ l2_normalize(slot_kernel)
    logits  = logits + noise                        noise only in training
    dispatch_weights = softmax(logits) over the tokens of the example
    combine_weights  = softmax(logits) over all slots of all experts
    ```

    Nothing is chosen and nothing is dropped: each slot is a weighted mean of
    all tokens of its example, and each token's output is a weighted mean of all
    slots. Examples do not mix. It is a router for `keras_moe.layers.SoftMoE`,
    not for `MoE`.

    With `"rms"` and `"layer"` both sides are normalized as `RMSNormalization`
    and `LayerNormalization` do, with a learned gain of each feature in the
    place of `scale`.

    All of it is computed in float32.

    Args:
        num_experts: int. Number of experts, `E`.
        slots_per_expert: int. Slots of each expert for an example, `P`.
            Defaults to `1`.
        normalization: `"l2"` (the paper), `"rms"` or `"layer"`: how the tokens
            and the slots' embeddings are normalized over their features.
            Defaults to `"l2"`.
        epsilon: float. Added to the sum of squares (`"l2"`), to their mean
            (`"rms"`) or to the variance (`"layer"`). Defaults to `1e-6`.
        mix_normalized: bool. Whether slots are mixed from the normalized
            tokens, rather than from the tokens as they are. Defaults to
            `False`.
        noise_stddev: float. Standard deviation of the normal noise that is
            added to the logits in training. Defaults to `0.0`.
        gumbel_noise: float. Factor of the standard Gumbel noise that is added
            to the logits in training. Defaults to `0.0`.
        kernel_initializer: Initializer of the slots' embeddings, drawn as a
            `(D, E * P)` matrix. Defaults to `"lecun_normal"`.
        kernel_regularizer: Regularizer of the embeddings. Defaults to `None`.
        scale_initializer: Initializer of the scale. Defaults to `"ones"`.
        seed: int, or `None`. Seed of the noise. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.Router`.

    Call arguments:
        inputs: Tensor of shape `(B, L, D)`.
        mask: Boolean tensor of shape `(B, L)`, or `None`. `False` tokens enter
            no slot, and take nothing from one.
        training: bool. Whether to add noise.

    Input shape:
        `(B, L, D)`

    Output:
        A `keras_moe.routers.SoftRouting`.

    Weights:
        `slot_kernel` `(D, E, P)`; with `"l2"` `scale` `()`, otherwise
        `token_gain` and `slot_gain` `(D,)`.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.SoftRouter(num_experts=4, slots_per_expert=2)
    >>> routing = router(keras.ops.ones((3, 5, 8)))
    >>> tuple(routing.dispatch_weights.shape)
    (3, 5, 4, 2)

    Reference:

    - [Puigcerver et al., 2023](https://arxiv.org/abs/2308.00951), section 2
      (algorithm 1 and, for the normalization, section 2.3)
    """

    looks_ahead = True
    routing_class = SoftRouting
    why_no_eval_top_k = "it mixes tokens instead of choosing experts"

    def __init__(
        self,
        num_experts,
        slots_per_expert=1,
        normalization="l2",
        epsilon=1e-6,
        mix_normalized=False,
        noise_stddev=0.0,
        gumbel_noise=0.0,
        kernel_initializer="lecun_normal",
        kernel_regularizer=None,
        scale_initializer="ones",
        seed=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        check_int("slots_per_expert", slots_per_expert, minimum=1)
        check_one_of("normalization", normalization, _NORMALIZATIONS)
        check_positive("epsilon", epsilon)
        check_bool("mix_normalized", mix_normalized)
        check_at_least("noise_stddev", noise_stddev, 0)
        check_seed("seed", seed)
        check_at_least("gumbel_noise", gumbel_noise, 0)
        self.slots_per_expert = slots_per_expert
        self.normalization = normalization
        self.epsilon = epsilon
        self.mix_normalized = mix_normalized
        self.noise_stddev = noise_stddev
        self.gumbel_noise = gumbel_noise
        self.kernel_initializer = as_keras_object(
            "kernel_initializer", keras.initializers.get, kernel_initializer
        )
        self.kernel_regularizer = as_keras_object(
            "kernel_regularizer", keras.regularizers.get, kernel_regularizer
        )
        self.scale_initializer = as_keras_object(
            "scale_initializer", keras.initializers.get, scale_initializer
        )
        self.seed = seed
        # Every call advances it: a router that draws nothing has none.
        if noise_stddev > 0 or gumbel_noise > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, inputs_shape):
        if len(inputs_shape) != 3 or inputs_shape[-1] is None:
            raise ValueError(
                "The inputs of SoftRouter must be of shape (B, L, D) with a "
                "static D, as `keras_moe.layers.SoftMoE` gives them. "
                f"Received: inputs_shape={tuple(inputs_shape)}"
            )
        dim = inputs_shape[-1]
        self.slot_kernel = self.add_weight(
            name="slot_kernel",
            shape=(dim, self.num_experts, self.slots_per_expert),
            initializer=self._draw_slots,
            regularizer=self.kernel_regularizer,
        )
        self.build_scores(dim)

    def build_scores(self, dim):
        """Makes the weights beside the embeddings of the slots."""
        self.scale = self.token_gain = self.slot_gain = None
        if self.normalization == "l2":
            self.scale = self.add_weight(
                name="scale", shape=(), initializer=self.scale_initializer
            )
        else:
            self.token_gain = self.add_gain("token_gain", dim)
            self.slot_gain = self.add_gain("slot_gain", dim)

    def add_gain(self, name, dim):
        return self.add_weight(name=name, shape=(dim,), initializer="ones")

    def _draw_slots(self, shape, dtype=None):
        # As a matrix: Keras would count E in the fan-in.
        matrix = (shape[0], shape[1] * shape[2])
        return ops.reshape(self.kernel_initializer(matrix, dtype=dtype), shape)

    def call(self, inputs, mask=None, training=None):
        keep = None
        if mask is not None:
            if len(mask.shape) != 2:
                raise ValueError(
                    "`mask` must be of shape (B, L). "
                    f"Received: mask.shape={tuple(mask.shape)}"
                )
            keep = ops.expand_dims(ops.cast(mask, "bool"), -1)  # (B, L, 1)
            # Masked tokens, which may be NaN, must not reach a gradient.
            inputs = ops.where(keep, inputs, ops.zeros_like(inputs))
            keep = ops.expand_dims(keep, -1)  # (B, L, 1, 1)
        tokens = self.normalize(inputs, -1, self.token_gain)
        logits = self.logits(tokens)  # (B, L, E, P)
        by_token, by_slot = self.scores(logits, training)
        shape = ops.shape(logits)
        slots = self.num_experts * self.slots_per_expert
        combine = self.combine(ops.reshape(by_slot, (*shape[:2], slots)))
        combine = ops.reshape(combine, shape)
        if keep is not None:
            # Minus infinity would give NaN if all tokens are masked.
            by_token = ops.where(keep, by_token, -1e30)
        dispatch = softmax(by_token, axis=1)
        if keep is not None:
            dispatch = ops.where(keep, dispatch, ops.zeros_like(dispatch))
            combine = ops.where(keep, combine, ops.zeros_like(combine))
        if self.mix_normalized:
            inputs = tokens
        return SoftRouting(logits, dispatch, combine, inputs)

    def logits(self, tokens):
        """The logits `(B, L, E, P)` of the normalized tokens."""
        slots = self.normalized_slots()
        logits = ops.einsum("bld,dep->blep", tokens, slots)
        # TensorFlow returns another shape if both B and L are zero.
        shape = (*ops.shape(tokens)[:2], *self.slot_kernel.shape[1:])
        return ops.reshape(logits, shape)

    def normalized_slots(self):
        """The embeddings of the slots `(D, E, P)` that tokens meet."""
        slots = self.normalize(self.slot_kernel, 0, self.slot_gain)
        return slots if self.scale is None else slots * self.scale

    def scores(self, logits, training):
        """The logits that dispatch, and those that combine, with the noise."""
        noisy = self.noisy(logits, training)
        return noisy, noisy

    def noisy(self, logits, training):
        if not training or not (self.noise_stddev or self.gumbel_noise):
            return logits
        return with_noise(
            logits, self.noise_stddev, self.gumbel_noise, self.seed_generator
        )

    def combine(self, logits):
        """The weights `(B, L, S)` of all slots of all experts."""
        return softmax(logits)

    def normalize(self, x, axis, gain):
        if self.normalization == "l2":
            return l2_normalized(x, self.epsilon, axis)
        if self.normalization == "layer":
            x = x - ops.mean(x, axis=axis, keepdims=True)
        x = rms_normalized(x, self.epsilon, axis)
        if axis == 0:
            gain = ops.reshape(gain, (-1, 1, 1))
        return x * gain

    def get_config(self):
        return {
            **super().get_config(),
            "slots_per_expert": self.slots_per_expert,
            "normalization": self.normalization,
            "epsilon": self.epsilon,
            "mix_normalized": self.mix_normalized,
            "noise_stddev": self.noise_stddev,
            "gumbel_noise": self.gumbel_noise,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "kernel_regularizer": keras.regularizers.serialize(
                self.kernel_regularizer
            ),
            "scale_initializer": keras.initializers.serialize(
                self.scale_initializer
            ),
            "seed": self.seed,
        }
