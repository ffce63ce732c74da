import keras
from keras import ops

from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.ops.choices import existing_choices
from keras_moe.ops.groups import check_per
from keras_moe.ops.groups import num_groups
from keras_moe.ops.groups import to_groups
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import SCORE_ACTIVATIONS
from keras_moe.ops.scores import score
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices
from keras_moe.ops.sinkhorn import sinkhorn
from keras_moe.routers.eval_top_k import EvalTopK
from keras_moe.routers.linear_router import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class SinkhornRouter(EvalTopK, LinearRouter):
    """Chooses the `top_k` experts after balancing the scores of a group.

    ```
    logits  = (tokens * jitter) @ kernel + bias     jitter only in training
    probs   = score_activation(logits)
    indices = top_k(sinkhorn(logits))               in training
    indices = top_k(logits)                         in inference
    weights = probs[indices]
    ```

    `keras_moe.ops.sinkhorn` scales the scores of the tokens of a group until
    all experts have the same share, so that the chosen experts are nearly
    balanced and no balancing loss is needed: give `MoE` `losses=None`. No
    gradient flows through it; gradients reach the kernel through the weights.

    In training what a token gets depends on later tokens, so `looks_ahead` is
    `True`. In inference it depends on the token alone.

    Masked tokens have no share and no expert.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Experts per token. Defaults to `1`.
        num_iterations: int. Iterations of Sinkhorn's algorithm. Defaults to
            `20`.
        per: Which tokens are balanced with each other: `"batch"`, those of
            each `"sequence"`, or of an int number of sequences. Defaults to
            `"batch"`.
        score_activation: `"softmax"` over all experts, `"sigmoid"` or
            `"sqrt_softplus"`. `None` is `"sigmoid"` for `top_k=1` and
            `"softmax"` for more. Defaults to `None`.
        eval_top_k: int, or `None` for `top_k`. Experts per token in inference;
            see `keras_moe.conversion.set_eval_top_k`. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.LinearRouter`: `jitter`,
            `temperature`, `use_bias`, initializers, regularizer, `seed`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`.
        training: bool. Whether to balance the scores and to apply jitter.
        num_sequences: int, or a scalar tensor. Number of sequences that the
            tokens are, if `per` is not `"batch"`. Defaults to `1`.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = top_k`, in training with the
        largest share first; in inference with `K = eval_top_k`.

    Raises:
        ValueError: If an argument is out of range, `D` is not static, or the
            sequences do not make up whole groups.

    Example:

    >>> router = keras_moe.routers.SinkhornRouter(num_experts=4, top_k=1)
    >>> routing = router(keras.ops.ones((3, 8)), training=True)
    >>> tuple(routing.expert_indices.shape), tuple(routing.probs.shape)
    ((3, 1), (3, 4))

    Reference:

    - [Clark et al., 2022](https://arxiv.org/abs/2202.01169), section 2 and
      appendix B (S-BASE)
    """

    looks_ahead = True
    distinct_choices = True
    routing_class = Routing

    def __init__(
        self,
        num_experts,
        top_k=1,
        num_iterations=20,
        per="batch",
        score_activation=None,
        eval_top_k=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        self.assign_top_k(top_k, eval_top_k)
        check_int("num_iterations", num_iterations, minimum=1)
        check_per(per)
        if score_activation is None:
            score_activation = "sigmoid" if top_k == 1 else "softmax"
        check_one_of("score_activation", score_activation, SCORE_ACTIVATIONS)
        self.num_iterations = num_iterations
        self.per = per
        self.score_activation = score_activation

    def call(self, tokens, mask=None, training=None, num_sequences=1):
        if mask is not None:
            mask = ops.cast(mask, "bool")
        logits = self.logits(zero_masked(tokens, mask), training)  # (T, E)
        probs = score(logits, self.score_activation)
        ranked = logits
        if training:
            ranked = self._balanced(logits, mask, num_sequences)
        top_k = self.num_choices(training)
        indices = top_k_indices(ranked, top_k)  # (T, K)
        weights = take_chosen(probs, indices)
        if mask is not None:
            missing = ops.expand_dims(ops.logical_not(mask), -1)  # (T, 1)
            indices, weights = existing_choices(
                indices, weights, missing, self.num_experts
            )
        return Routing(logits, probs, indices, weights)

    def _balanced(self, logits, mask, num_sequences):
        groups = num_groups(self.per, num_sequences)
        if mask is not None:
            mask = to_groups(mask, groups)  # (G, S)
        grouped = to_groups(ops.stop_gradient(logits), groups)  # (G, S, E)
        shares = sinkhorn(grouped, self.num_iterations, mask)
        return ops.reshape(shares, ops.shape(logits))

    def get_config(self):
        return {
            **super().get_config(),
            "num_iterations": self.num_iterations,
            "per": self.per,
            "score_activation": self.score_activation,
        }
