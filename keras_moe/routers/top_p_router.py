import keras
from keras import ops

from keras_moe.checks import is_number
from keras_moe.ops.choices import existing_choices
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import normalize_weights as normalized
from keras_moe.ops.scores import softmax
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices
from keras_moe.routers.choice_arguments import as_max_experts
from keras_moe.routers.choice_arguments import as_normalize_weights
from keras_moe.routers.linear_router import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class TopPRouter(LinearRouter):
    """Sends each token to as many experts as it takes to reach `top_p`.

    ```
    logits  = (tokens * jitter) @ kernel + bias     jitter only in training
    probs   = softmax(logits / temperature)
    indices = the smallest set of experts with sum(probs[indices]) >= top_p,
              best first, at most max_experts
    weights = probs[indices]
    weights = weights / sum(weights)                if normalize_weights
    ```

    The expert that crosses the threshold belongs to the set. A token gets one
    expert where the router is sure, more where it is not. As more experts fit
    the data better, training would make the router unsure. Therefore the paper
    adds the entropy of `probs` to the loss, with a weight of 1e-4: give `MoE` a
    `keras_moe.losses.EntropyLoss` along with a balancing loss.

    Gradients reach the kernel through the weights; the choice itself has none.
    Ties go to the lower index. All of it is computed in float32.

    Args:
        num_experts: int. Number of experts to choose from.
        top_p: float, above 0 and at most 1. Probability that the chosen
            experts reach together. With 1, all experts are chosen whose
            probability makes a difference in float32. Defaults to `0.4`.
        max_experts: int, or `None` for all of them. Experts per token at most,
            the best ones, even if they do not reach `top_p`. It also bounds
            memory, which is taken for `max_experts` rows per token. Defaults
            to `None`.
        normalize_weights: bool. Whether to divide the weights of a token by
            their sum. A token with a single expert then gives the router no
            gradient; with `max_experts=1`, where none would, it is refused.
            Defaults to `False`.
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
        `probs` are the probabilities of all experts.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.TopPRouter(
    ...     num_experts=3, top_p=0.6, kernel_initializer="identity"
    ... )
    >>> routing = router(keras.ops.array([[0.0, 0.5, 0.0], [0.0, 0.0, 9.0]]))
    >>> keras.ops.convert_to_numpy(routing.expert_indices).tolist()
    [[1, 0, 3], [2, 3, 3]]

    Reference:

    - [Huang et al., 2024](https://arxiv.org/abs/2403.07652), section 2
    """

    distinct_choices = True
    routing_class = Routing
    why_no_eval_top_k = "`top_p` sets how many experts a token has"

    def __init__(
        self,
        num_experts,
        top_p=0.4,
        max_experts=None,
        normalize_weights=False,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        if not is_number(top_p) or not 0 < top_p <= 1:
            raise ValueError(
                "`top_p` must be above 0 and at most 1. "
                f"Received: top_p={top_p!r}"
            )
        as_max_experts(max_experts, num_experts)
        self.top_p = top_p
        self.max_experts = max_experts
        self.normalize_weights = as_normalize_weights(
            normalize_weights, max_experts, False, limit_name="max_experts"
        )

    @property
    def choices_per_token(self):
        return as_max_experts(self.max_experts, self.num_experts)

    def call(self, tokens, mask=None, training=None):
        logits = self.logits(tokens, training)  # (T, E)
        probs = softmax(logits)
        indices = top_k_indices(logits, self.choices_per_token)  # (T, K)
        weights = take_chosen(probs, indices)
        reached = ops.cumsum(ops.stop_gradient(weights), axis=-1)
        # What the better experts reach without this one; 0 for the first.
        before = ops.concatenate(
            [ops.zeros_like(reached[:, :1]), reached[:, :-1]], axis=-1
        )
        missing = ops.logical_or(before >= self.top_p, weights <= 0)
        indices, weights = existing_choices(
            indices, weights, missing, self.num_experts
        )
        if self.normalize_weights:
            weights = normalized(weights)
        return Routing(logits, probs, indices, weights)

    def get_config(self):
        return {
            **super().get_config(),
            "top_p": self.top_p,
            "max_experts": self.max_experts,
            "normalize_weights": self.normalize_weights,
        }
