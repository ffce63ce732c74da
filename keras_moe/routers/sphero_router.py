import keras
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.checks import check_positive
from keras_moe.checks import is_number
from keras_moe.ops.entmax import entmax
from keras_moe.routers.normalizations import rms_normalized
from keras_moe.routers.soft_router import SoftRouter


@keras.saving.register_keras_serializable("keras_moe")
class SpheroRouter(SoftRouter):
    """A `SoftRouter` whose tokens take results from few slots (MoE Jetpack).

    ```
    slots   = l2_normalize(layer_norm(slot_kernel))
    logits  = l2_normalize(tokens) @ slots
    dispatch_weights = softmax(logits / dispatch_temperature + noise)
                       over the tokens of the example
    combine_weights  = entmax(logits / combine_temperature + noise)
                       over all slots of all experts; most of them are zero
    ```

    Noise is only in training, the same in both. Slots are mixed from the tokens
    as they are. Experts may be of two sizes, as the few large and the many
    small ones of the paper: `keras_moe.experts.MixedExperts`.

    Args:
        num_experts: int. Number of experts, `E`.
        slots_per_expert: int. Slots of each expert for an example, `P`.
            Defaults to `1`.
        normalize_slots: bool. Whether the slots' embeddings go through a layer
            norm, with gain and bias. Defaults to `True`.
        alpha: float above 1, of `keras_moe.ops.entmax`. Defaults to `1.5`.
        temperature: float. Both temperatures at the start; they are learned.
            Defaults to `0.5`.
        epsilon: float. Added to the squares of lengths. Defaults to `1e-12`.
        noise_stddev, gumbel_noise: As for `SoftRouter`. Default to `0.0`.
        kernel_initializer: Initializer of the slots' embeddings, drawn as a
            `(D, E * P)` matrix. Defaults to `"orthogonal"`.
        kernel_regularizer: Regularizer of the embeddings. Defaults to `None`.
        seed: int, or `None`. Seed of the noise. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.Router`.

    Call arguments:
        inputs, mask, training: As for `SoftRouter`.

    Input shape:
        `(B, L, D)`

    Output:
        A `keras_moe.routers.SoftRouting`.

    Weights:
        `slot_kernel` `(D, E, P)`, `dispatch_temperature` and
        `combine_temperature` `()`, with `normalize_slots` `slot_gain` and
        `slot_bias` `(D,)`.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.SpheroRouter(num_experts=6)
    >>> experts = keras_moe.experts.MixedExperts([
    ...     keras_moe.experts.MLPExperts(2, 32, activation="gelu"),
    ...     keras_moe.experts.MLPExperts(4, 8, activation="gelu"),
    ... ])
    >>> layer = keras_moe.layers.SoftMoE(router=router, experts=experts)
    >>> tuple(layer(keras.ops.ones((3, 5, 8))).shape)
    (3, 5, 8)

    Reference:

    - [Zhu et al., 2024](https://arxiv.org/abs/2406.04801), section 3.2
    """

    def __init__(
        self,
        num_experts,
        slots_per_expert=1,
        normalize_slots=True,
        alpha=1.5,
        temperature=0.5,
        epsilon=1e-12,
        noise_stddev=0.0,
        gumbel_noise=0.0,
        kernel_initializer="orthogonal",
        kernel_regularizer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(
            num_experts,
            slots_per_expert,
            epsilon=epsilon,
            noise_stddev=noise_stddev,
            gumbel_noise=gumbel_noise,
            kernel_initializer=kernel_initializer,
            kernel_regularizer=kernel_regularizer,
            seed=seed,
            **kwargs,
        )
        check_bool("normalize_slots", normalize_slots)
        if not is_number(alpha) or alpha <= 1:
            raise ValueError(
                f"`alpha` must be a number above 1. Received: alpha={alpha!r}"
            )
        check_positive("temperature", temperature)
        self.normalize_slots = normalize_slots
        self.alpha = alpha
        self.temperature = temperature

    def build_scores(self, dim):
        self.token_gain = self.slot_gain = self.slot_bias = None
        if self.normalize_slots:
            self.slot_gain = self.add_gain("slot_gain", dim)
            self.slot_bias = self.add_weight(
                name="slot_bias", shape=(dim,), initializer="zeros"
            )
        for name in ("dispatch_temperature", "combine_temperature"):
            temperature = self.add_weight(
                name=name,
                shape=(),
                initializer=keras.initializers.Constant(self.temperature),
            )
            setattr(self, name, temperature)

    def normalized_slots(self):
        slots = ops.convert_to_tensor(self.slot_kernel)
        if self.normalize_slots:
            slots = slots - ops.mean(slots, axis=0, keepdims=True)
            slots = rms_normalized(slots, 1e-5, axis=0)
            slots = slots * ops.reshape(self.slot_gain, (-1, 1, 1))
            slots = slots + ops.reshape(self.slot_bias, (-1, 1, 1))
        return self.normalize(slots, 0, None)

    def scores(self, logits, training):
        noise = self.noisy(ops.zeros_like(logits), training)
        return (
            logits / self.dispatch_temperature + noise,
            logits / self.combine_temperature + noise,
        )

    def combine(self, logits):
        return entmax(logits, self.alpha)

    def get_config(self):
        config = super().get_config()
        for name in ("normalization", "mix_normalized", "scale_initializer"):
            config.pop(name)
        return {
            **config,
            "normalize_slots": self.normalize_slots,
            "alpha": self.alpha,
            "temperature": self.temperature,
        }
