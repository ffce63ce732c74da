import keras
import numpy as np
from keras import ops

from keras_moe.checks import as_keras_object
from keras_moe.checks import check_at_least
from keras_moe.checks import check_bool
from keras_moe.checks import check_int_up_to
from keras_moe.checks import check_positive
from keras_moe.checks import check_seed
from keras_moe.ops.choices import positive_choices
from keras_moe.ops.masking import masked_mean
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import softmax
from keras_moe.ops.smooth_step import smooth_step
from keras_moe.routers.router import Router
from keras_moe.stacked.draws import own_draws


@keras.saving.register_keras_serializable("keras_moe")
class DSelectKRouter(Router):
    """Learns which `top_k` experts to choose by gradient descent (DSelect-k).

    Each of `top_k` selectors holds the number of an expert in binary, with bits
    between 0 and 1 while it learns:

    ```
    bits[s]     = smooth_step(tokens @ selector_kernel[s] + selector_bias[s])
    selector[s] = for each expert, the product over its binary code of
                  bits[s] where the code has a 1 and 1 - bits[s] where a 0
    mixture     = softmax(tokens @ mixture_kernel + mixture_bias)
    weights     = sum over s of mixture[s] * selector[s]
    ```

    `smooth_step` reaches 0 and 1 exactly, so a selector can settle on a single
    expert, and at most `top_k` weights are left. Nothing jumps, so the whole is
    differentiable, and everything learns from the start. The price is that
    **all experts are computed for all tokens until the selectors have
    settled**, in inference too. Experts of weight 0 are not computed.

    In training two losses are added, both a mean over the tokens:

    ```
    entropy_weight     * -sum over s, e of selector * log(selector + 1e-6)
    unused_code_weight * sum over s of 1 / (sum over e of selector)
    ```

    The first moves selectors towards a decision, which they may not reach
    without it, and is 0 afterwards. The second is added only if `num_experts`
    is not a power of two. Then some codes stand for no expert, what selectors
    put on them is lost, and **the weights of a token sum to less than one**
    until the loss has moved all to the experts. Its best value is `top_k`.
    (The original sums both over the batch, with the weights 1e-6 and 1.)

    A selector gets no gradient any more once it has lost all of its weight to
    unused codes, or has decided, all bits being 0 or 1. All of it is computed
    in float32.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Number of selectors, so of experts per token at the end.
            Two selectors may come to the same expert. Defaults to `2`.
        gamma: float, positive. Width of the smooth step: the smaller, the
            sooner bits are decided. Defaults to `1.0`.
        per_token: bool. Whether the choice depends on the token. If `False`,
            there are no kernels and all tokens get the same experts: the router
            learns which ones the layer uses at all, as one wants of a router
            for one task. Defaults to `True`.
        entropy_weight: float. Weight of the first loss. Defaults to `0.0`.
        unused_code_weight: float. Weight of the second. Defaults to `1.0`.
        selector_initializer: Initializer of the selectors' kernel and bias.
            `None` is uniform between `-gamma / 100` and `gamma / 100`: bits
            start close to 1/2. Defaults to `None`.
        mixture_initializer: Initializer of the mixture's kernel and bias.
            `None` is `"random_uniform"`. Defaults to `None`.
        seed: int, or `None`. Seed of the default initializers. Defaults to
            `None`.
        **kwargs: Arguments of `keras_moe.routers.Router`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. `False` tokens do not
            count in the losses.
        training: bool. Whether to add the losses.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = E`, best first. Choices of
        weight 0 do not exist: they have the index `num_experts`. Its `probs`
        are the weights of all experts, its `logits` the logarithms of these, or
        of 1e-20 if that is larger.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.DSelectKRouter(num_experts=4, top_k=2)
    >>> routing = router(keras.ops.ones((3, 8)))
    >>> tuple(routing.expert_indices.shape)
    (3, 4)

    Reference:

    - [Hazimeh et al., 2021](https://arxiv.org/abs/2106.03760), section 3
    """

    distinct_choices = True
    routing_class = Routing
    why_no_eval_top_k = "its selectors learn which weights are above 0"

    def __init__(
        self,
        num_experts,
        top_k=2,
        gamma=1.0,
        per_token=True,
        entropy_weight=0.0,
        unused_code_weight=1.0,
        selector_initializer=None,
        mixture_initializer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        check_int_up_to("top_k", top_k, "num_experts", num_experts)
        check_positive("gamma", gamma)
        check_bool("per_token", per_token)
        check_seed("seed", seed)
        check_at_least("entropy_weight", entropy_weight, 0)
        check_at_least("unused_code_weight", unused_code_weight, 0)
        self.top_k = top_k
        self.gamma = gamma
        self.per_token = per_token
        self.entropy_weight = entropy_weight
        self.unused_code_weight = unused_code_weight
        if selector_initializer is None:
            selector_initializer = keras.initializers.RandomUniform(
                -gamma / 100, gamma / 100, seed=seed
            )
        if mixture_initializer is None:
            mixture_initializer = keras.initializers.RandomUniform(seed=seed)
        self.selector_initializer = as_keras_object(
            "selector_initializer", keras.initializers.get, selector_initializer
        )
        self.mixture_initializer = as_keras_object(
            "mixture_initializer", keras.initializers.get, mixture_initializer
        )
        self.seed = seed
        self.num_bits = (num_experts - 1).bit_length()

    def build(self, tokens_shape):
        if len(tokens_shape) != 2 or tokens_shape[-1] is None:
            raise ValueError(
                "The tokens of a router must be of shape (T, D) with a static "
                f"D. Received: tokens_shape={tuple(tokens_shape)}"
            )
        dim = tokens_shape[-1]
        num_bits = self.top_k * self.num_bits
        if num_bits:  # none if there is one expert
            self._add_affine(
                "selector", dim, num_bits, self.selector_initializer, 0
            )
        if self.top_k > 1:
            self._add_affine(
                "mixture", dim, self.top_k, self.mixture_initializer, 2
            )

    @property
    def choices_per_token(self):
        return self.num_experts

    def _add_affine(self, name, dim, units, initializer, stream):
        # From one seed all four would begin with the same numbers.
        if self.per_token:
            kernel = self.add_weight(
                name=f"{name}_kernel",
                shape=(dim, units),
                initializer=own_draws(initializer, stream),
            )
            setattr(self, f"{name}_kernel", kernel)
        bias = self.add_weight(
            name=f"{name}_bias",
            shape=(units,),
            initializer=own_draws(initializer, stream + 1),
        )
        setattr(self, f"{name}_bias", bias)

    def _affine(self, name, tokens):
        bias = ops.expand_dims(getattr(self, f"{name}_bias"), 0)
        if not self.per_token:
            return ops.repeat(bias, ops.shape(tokens)[0], axis=0)
        kernel = getattr(self, f"{name}_kernel")
        return ops.einsum("td,du->tu", tokens, kernel) + bias

    def call(self, tokens, mask=None, training=None):
        # A NaN in a masked token must not reach a loss.
        tokens = zero_masked(tokens, mask)
        selectors = self.selectors(tokens)  # (T, K, E)
        if self.top_k > 1:
            mixture = softmax(self._affine("mixture", tokens))
            probs = ops.einsum("tk,tke->te", mixture, selectors)
        else:
            probs = selectors[:, 0]
        # Where all is 0, the gradient of a loss that divides by the sum may be
        # NaN.
        probs = ops.where(probs <= 0, ops.zeros_like(probs), probs)
        if training:
            self._regularize(selectors, mask)
        logits = ops.log(ops.clip(probs, 1e-20, float("inf")))
        indices, weights = positive_choices(probs, probs, self.num_experts)
        return Routing(logits, probs, indices, weights)

    def selectors(self, tokens):
        """What each selector gives each expert, `(T, top_k, E)`."""
        num_tokens = ops.shape(tokens)[0]
        shape = (num_tokens, self.top_k, self.num_experts)
        selectors = ops.ones(shape, self.compute_dtype)
        if not self.num_bits:
            return selectors
        bits = self._affine("selector", tokens)
        bits = ops.reshape(bits, (num_tokens, self.top_k, self.num_bits))
        expert = np.arange(self.num_experts)
        # A loop, as the gradient of `prod` is not reliable at zeros.
        for place in range(self.num_bits):  # the most significant bit first
            is_one = expert >> (self.num_bits - 1 - place) & 1
            sign = ops.convert_to_tensor(2 * is_one - 1, self.compute_dtype)
            # 1 - smooth_step(x) is smooth_step(-x), which cannot be below 0.
            bit = bits[:, :, place : place + 1] * sign  # (T, K, E)
            selectors = selectors * smooth_step(bit, self.gamma)
        return selectors

    def _regularize(self, selectors, mask):
        selectors = ops.cast(selectors, "float32")
        if self.entropy_weight > 0:
            entropy = -selectors * ops.log(selectors + 1e-6)
            entropy = masked_mean(
                ops.sum(entropy, axis=(1, 2)), mask, all_reduce=True
            )
            self.add_loss(self.entropy_weight * entropy)
        if self.num_experts < 2**self.num_bits and self.unused_code_weight > 0:
            used = ops.maximum(ops.sum(selectors, axis=-1), 1e-6)  # (T, K)
            penalty = masked_mean(
                ops.sum(1 / used, axis=-1), mask, all_reduce=True
            )
            self.add_loss(self.unused_code_weight * penalty)

    def get_config(self):
        return {
            **super().get_config(),
            "top_k": self.top_k,
            "gamma": self.gamma,
            "per_token": self.per_token,
            "entropy_weight": self.entropy_weight,
            "unused_code_weight": self.unused_code_weight,
            "selector_initializer": keras.initializers.serialize(
                self.selector_initializer
            ),
            "mixture_initializer": keras.initializers.serialize(
                self.mixture_initializer
            ),
            "seed": self.seed,
        }
