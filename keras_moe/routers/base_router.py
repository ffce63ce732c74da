import keras
from keras import ops

from keras_moe.checks import check_seed
from keras_moe.ops.balanced_assignment import balanced_assignment
from keras_moe.ops.choices import existing_choices
from keras_moe.ops.groups import check_per
from keras_moe.ops.groups import num_groups
from keras_moe.ops.groups import to_groups
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.routing import Routing
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices
from keras_moe.routers.linear_router import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class BASERouter(LinearRouter):
    """Assigns equally many tokens to each expert in training.

    ```
    logits  = tokens @ kernel                 columns: the experts' centroids
    indices = balanced_assignment(logits)     in training
    indices = argmax(logits)                  in inference
    weights = sigmoid(logits[indices])
    ```

    `keras_moe.ops.balanced_assignment` finds the assignment of the tokens of a
    group with the largest sum of logits, at loads that differ by one at most.
    No balancing loss is needed: give `MoE` `losses=None`. Gradients reach the
    kernel through the weights. The assignment loops until the loads are
    balanced; it takes longer for more tokens and for less balanced ones.

    The BASE layer of the paper returns `a * f(x) + (1 - a) * x`, where `a` is
    the weight and `f` contains a residual connection. `MoE` with this router
    gives `a * f(x)`. If `f(x) = x + g(x)`, the layer is `x + a * g(x)`: a
    residual connection around `MoE` with experts `g`.

    In training what a token gets depends on later tokens, so `looks_ahead` is
    `True`. In inference it depends on the token alone.

    Masked tokens are not assigned: they have no expert.

    Args:
        num_experts: int. Number of experts to choose from.
        per: Which tokens are assigned together: `"batch"`, those of each
            `"sequence"`, or of an int number of sequences. Defaults to
            `"batch"`.
        kernel_initializer: Initializer of the `(D, E)` kernel. `None` is
            `Orthogonal(gain=0.1)`. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.LinearRouter`: `jitter`,
            `temperature`, `use_bias`, initializers, regularizer, `seed`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`.
        training: bool. Whether to balance the assignment and apply jitter.
        num_sequences: int, or a scalar tensor. Number of sequences that the
            tokens are, if `per` is not `"batch"`. Defaults to `1`.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = 1`. Its `probs` are
        `sigmoid(logits)`.

    Raises:
        ValueError: If an argument is out of range, `D` is not static, or the
            sequences do not make up whole groups.

    Example:

    >>> router = keras_moe.routers.BASERouter(num_experts=2)
    >>> routing = router(keras.random.normal((4, 8)), training=True)
    >>> counts = keras_moe.ops.expert_counts(routing, num_experts=2)
    >>> keras.ops.convert_to_numpy(counts).tolist()
    [2.0, 2.0]

    Reference:

    - [Lewis et al., 2021](https://arxiv.org/abs/2103.16716), section 3
    """

    looks_ahead = True
    distinct_choices = True
    routing_class = Routing
    why_no_eval_top_k = "an assignment gives each token one expert"
    choices_per_token = 1

    def __init__(
        self,
        num_experts,
        per="batch",
        kernel_initializer=None,
        seed=None,
        **kwargs,
    ):
        check_per(per)
        check_seed("seed", seed)
        if kernel_initializer is None:
            kernel_initializer = keras.initializers.Orthogonal(0.1, seed=seed)
        super().__init__(
            num_experts,
            kernel_initializer=kernel_initializer,
            seed=seed,
            **kwargs,
        )
        self.per = per

    def call(self, tokens, mask=None, training=None, num_sequences=1):
        if mask is not None:
            mask = ops.cast(mask, "bool")
        logits = self.logits(zero_masked(tokens, mask), training)  # (T, E)
        probs = ops.sigmoid(logits)
        if training:
            chosen = self._assigned(logits, mask, num_sequences)
        else:
            chosen = top_k_indices(logits, 1)  # (T, 1)
        # Where a token has no expert, any index will do.
        some = ops.minimum(chosen, self.num_experts - 1)
        weights = take_chosen(probs, some)
        if mask is not None:
            missing = ops.expand_dims(ops.logical_not(mask), -1)  # (T, 1)
            chosen, weights = existing_choices(
                chosen, weights, missing, self.num_experts
            )
        return Routing(logits, probs, chosen, weights)

    def _assigned(self, logits, mask, num_sequences):
        groups = num_groups(self.per, num_sequences)
        if mask is not None:
            mask = to_groups(mask, groups)  # (G, S)
        assigned = balanced_assignment(to_groups(logits, groups), mask)
        return ops.reshape(assigned, (-1, 1))

    def get_config(self):
        return {**super().get_config(), "per": self.per}
