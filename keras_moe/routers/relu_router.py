import keras
from keras import ops

from keras_moe import backend
from keras_moe.checks import check_at_least
from keras_moe.checks import is_number
from keras_moe.ops.choices import positive_choices
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.routing import Routing
from keras_moe.routers.choice_arguments import as_max_experts
from keras_moe.routers.linear_router import LinearRouter

# Well within float32, where a coefficient of 0 could not grow again.
_RANGE = (1e-30, 1e30)


@keras.saving.register_keras_serializable("keras_moe")
class ReLURouter(LinearRouter):
    """Sends each token to the experts with a positive logit (ReMoE).

    ```
    logits  = (tokens * jitter) @ kernel + bias     jitter only in training
    probs   = relu(logits / temperature)
    indices = the experts of probs > 0, best first, at most max_experts
    weights = probs[indices]
    ```

    The weights are not normalized, so that the whole is continuous. The logits
    decide how many experts a token gets. **A token may get none**: then `MoE`
    gives zero, and only a residual connection around `MoE` carries the token
    on. Do not use this router without one.

    In training, a loss keeps the number of experts at `top_k` on average. It is
    the L1 norm of the weights, each multiplied by the load of its expert, so
    that it also balances:

    ```
    count[e] = number of tokens with probs[:, e] > 0         no gradient
    loss     = l1_coefficient * E / (top_k * T ** 2)
               * sum over e of count[e] * sum(probs[:, e])
    sparsity = share of zeros in probs
    l1_coefficient *= l1_multiplier     if sparsity < 1 - top_k / E
    l1_coefficient /= l1_multiplier     otherwise
    ```

    With it, no other balancing loss is needed: give `MoE` `losses=None`. The
    coefficient is a non-trainable weight, saved and loaded with the others. It
    moves after the loss of each training call, but not in a frozen router
    (`trainable=False`), nor in a call without a token. Masked tokens count
    nowhere. Choices that `max_experts` cuts off count all the same. All of it
    is computed in float32, and the coefficient stays between 1e-30 and 1e30.

    Each router has its own coefficient; the paper has one for all layers, moved
    by their mean sparsity. Where several devices train together, the tokens of
    all of them count.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int or float, above 0 and below `num_experts` (or equal to it,
            for no sparsity). Experts per token to aim at, on average. Defaults
            to `2`.
        max_experts: int, or `None` for all of them. Experts per token at most,
            the best ones. It also bounds memory, which is taken for
            `max_experts` rows per token. Defaults to `None`.
        initial_l1_coefficient: float, positive. Where the coefficient starts.
            Defaults to `1e-8`.
        l1_multiplier: float, at least 1. What it is multiplied or divided by
            each time. With 1 it is constant. Defaults to `1.2`.
        **kwargs: Arguments of `LinearRouter`: `jitter`, `temperature`,
            `use_bias`, `kernel_initializer`, `bias_initializer`,
            `kernel_regularizer`, `seed`, and of `keras_moe.routers.Router`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. `False` tokens count
            neither in the loss nor in the sparsity.
        training: bool. Whether to apply jitter, to add the loss and to move
            the coefficient.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = max_experts` or `E`. Choices
        that do not exist have the index `num_experts` and the weight 0. Its
        `probs` are the scores of all experts; they do not sum to one.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.ReLURouter(
    ...     num_experts=3, top_k=1, kernel_initializer="identity"
    ... )
    >>> routing = router(keras.ops.array([[0.5, 0.0, 2.0], [-1.0, 0.0, -1.0]]))
    >>> keras.ops.convert_to_numpy(routing.expert_indices).tolist()
    [[2, 0, 3], [3, 3, 3]]

    Reference:

    - [Wang et al., 2024](https://arxiv.org/abs/2412.14711), section 3
    """

    distinct_choices = True
    routing_class = Routing
    why_no_eval_top_k = "each token has the experts with a score above 0"

    def __init__(
        self,
        num_experts,
        top_k=2,
        max_experts=None,
        initial_l1_coefficient=1e-8,
        l1_multiplier=1.2,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        if not is_number(top_k) or not 0 < top_k <= num_experts:
            raise ValueError(
                "`top_k` must be above 0 and at most `num_experts`. "
                f"Received: top_k={top_k!r}, num_experts={num_experts}"
            )
        as_max_experts(max_experts, num_experts)
        if not is_number(initial_l1_coefficient) or not (
            _RANGE[0] <= initial_l1_coefficient <= _RANGE[1]
        ):
            raise ValueError(
                "`initial_l1_coefficient` must be between 1e-30 and 1e30. "
                f"Received: initial_l1_coefficient={initial_l1_coefficient!r}"
            )
        check_at_least("l1_multiplier", l1_multiplier, 1)
        self.top_k = top_k
        self.max_experts = max_experts
        self.initial_l1_coefficient = initial_l1_coefficient
        self.l1_multiplier = l1_multiplier

    @property
    def choices_per_token(self):
        return as_max_experts(self.max_experts, self.num_experts)

    def build(self, tokens_shape):
        super().build(tokens_shape)
        # `add_weight` has no `synchronization`. With any other, replicas would
        # wait for each other inside `call` and lose their losses.
        self.l1_coefficient = keras.Variable(
            keras.initializers.Constant(self.initial_l1_coefficient),
            shape=(),
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="mean",
            synchronization="on_read",
            name="l1_coefficient",
        )

    def call(self, tokens, mask=None, training=None):
        # A NaN in a masked token must not reach the loss.
        logits = self.logits(zero_masked(tokens, mask), training)  # (T, E)
        probs = ops.relu(logits)
        indices, weights = positive_choices(
            logits, probs, self.choices_per_token
        )
        if training:
            self._regularize(ops.cast(probs, "float32"), mask)
        return Routing(logits, probs, indices, weights)

    def _regularize(self, probs, mask):
        num_tokens = ops.cast(ops.shape(probs)[0], "float32")
        if mask is not None:
            probs = zero_masked(probs, mask)
            num_tokens = ops.sum(ops.cast(mask, "float32"))
        num_tokens = backend.all_reduce_sum(num_tokens)
        counts = ops.sum(ops.cast(probs > 0, "float32"), axis=0)  # (E,)
        counts = backend.all_reduce_sum(counts)
        totals = backend.all_reduce_sum(ops.sum(probs, axis=0))
        scale = self.num_experts / self.top_k
        scale = scale / ops.square(ops.maximum(num_tokens, 1.0))
        prices = ops.stop_gradient(self.l1_coefficient * scale * counts)
        self.add_loss(ops.sum(prices * totals))
        if self.trainable:
            self._adapt(ops.sum(counts), num_tokens)

    def _adapt(self, num_choices, num_tokens):
        # sparsity < 1 - top_k / E, in numbers that are exact.
        too_many = num_choices > self.top_k * num_tokens
        before = ops.convert_to_tensor(self.l1_coefficient)
        after = ops.where(
            too_many, before * self.l1_multiplier, before / self.l1_multiplier
        )
        after = ops.where(num_tokens > 0, ops.clip(after, *_RANGE), before)
        self.l1_coefficient.assign(ops.stop_gradient(after))

    def get_config(self):
        return {
            **super().get_config(),
            "top_k": self.top_k,
            "max_experts": self.max_experts,
            "initial_l1_coefficient": self.initial_l1_coefficient,
            "l1_multiplier": self.l1_multiplier,
        }
