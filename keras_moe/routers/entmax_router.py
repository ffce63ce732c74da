import keras

from keras_moe.checks import is_number
from keras_moe.ops.choices import positive_choices
from keras_moe.ops.entmax import entmax
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import normalize_weights as normalized
from keras_moe.routers.choice_arguments import as_max_experts
from keras_moe.routers.choice_arguments import as_normalize_weights
from keras_moe.routers.linear_router import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class EntmaxRouter(LinearRouter):
    """Sends each token to all experts to which entmax gives a probability.

    ```
    logits  = (tokens * jitter) @ kernel + bias     jitter only in training
    probs   = entmax(logits / temperature, alpha)   with exact zeros
    indices = the experts of probs > 0, best first, at most max_experts
    weights = probs[indices]
    weights = weights / sum(weights)                if normalize_weights
    ```

    The logits decide how many experts a token gets: one where the best is far
    ahead, all where they are equal. The choice needs no noise and does not
    jump: an expert comes in with weight 0. The larger `alpha` and the smaller
    `temperature`, the fewer experts. Ties go to the lower index. All of it is
    computed in float32.

    Args:
        num_experts: int. Number of experts to choose from.
        alpha: float above 1. 1.5 is entmax-1.5, 2 is sparsemax, close to 1 is
            close to softmax. Defaults to `1.5`.
        max_experts: int, or `None` for all of them. Experts per token at most,
            the best ones. It also bounds memory, which is taken for
            `max_experts` rows per token. Defaults to `None`.
        normalize_weights: bool. Whether to divide the weights of a token by
            their sum, which only matters where `max_experts` has left some
            out. Defaults to `True`, for `max_experts=1` to `False`; there
            `True` is refused, as the weight would always be one and the router
            would get no gradient.
        **kwargs: Arguments of `LinearRouter`: `jitter`, `temperature`,
            `use_bias`, `kernel_initializer`, `bias_initializer`,
            `kernel_regularizer`, `seed`, and of `keras_moe.routers.Router`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. Each token is routed on
            its own, so it is ignored here; `MoE` leaves masked tokens out.
        training: bool. Whether to apply jitter.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = max_experts` or `E`. Choices
        that do not exist have the index `num_experts` and the weight 0. Its
        `probs` are the probabilities of all experts, before any is left out.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.EntmaxRouter(
    ...     num_experts=3, alpha=2.0, kernel_initializer="identity"
    ... )
    >>> routing = router(keras.ops.array([[0.0, 0.5, 0.0], [0.0, 0.0, 9.0]]))
    >>> keras.ops.convert_to_numpy(routing.expert_indices).tolist()
    [[1, 0, 2], [2, 3, 3]]

    Reference:

    - [Martins and Astudillo, 2016](https://arxiv.org/abs/1602.02068)
      (sparsemax)
    - [Peters et al., 2019](https://arxiv.org/abs/1905.05702), section 3
      (entmax)
    """

    distinct_choices = True
    routing_class = Routing
    why_no_eval_top_k = "each token has the experts with a probability above 0"

    def __init__(
        self,
        num_experts,
        alpha=1.5,
        max_experts=None,
        normalize_weights=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        if not is_number(alpha) or alpha <= 1:
            raise ValueError(
                f"`alpha` must be above 1 and finite. Received: alpha={alpha!r}"
            )
        as_max_experts(max_experts, num_experts)
        self.alpha = alpha
        self.max_experts = max_experts
        self.normalize_weights = as_normalize_weights(
            normalize_weights, max_experts, limit_name="max_experts"
        )

    @property
    def choices_per_token(self):
        return as_max_experts(self.max_experts, self.num_experts)

    def call(self, tokens, mask=None, training=None):
        logits = self.logits(tokens, training)  # (T, E)
        probs = entmax(logits, self.alpha)
        top_k = self.choices_per_token
        indices, weights = positive_choices(logits, probs, top_k)
        if self.normalize_weights and top_k < self.num_experts:
            weights = normalized(weights)
        return Routing(logits, probs, indices, weights)

    def get_config(self):
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "max_experts": self.max_experts,
            "normalize_weights": self.normalize_weights,
        }
