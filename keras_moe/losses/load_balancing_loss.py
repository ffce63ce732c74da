import keras
from keras import ops

from keras_moe import backend
from keras_moe.checks import check_bool
from keras_moe.checks import check_one_of
from keras_moe.losses.grouped_loss import GroupedLoss
from keras_moe.ops.assignments import ASSIGNMENTS
from keras_moe.ops.assignments import SCORES
from keras_moe.ops.assignments import assigned_experts
from keras_moe.ops.assignments import counts_by_expert
from keras_moe.ops.assignments import expert_scores
from keras_moe.ops.masking import token_counts


@keras.saving.register_keras_serializable("keras_moe")
class LoadBalancingLoss(GroupedLoss):
    """The load balancing loss of GShard and the Switch Transformer.

    ```
    f[e] = share of all assignments that went to expert e    (sums to 1)
    P[e] = mean over tokens of the probability of expert e   (sums to 1)
    loss = num_experts * sum(f * P)
    ```

    At perfect balance the loss is 1, whatever `top_k`: all `top_k` choices
    count in `f`, divided by their number. Assignments count before any is
    dropped for lack of capacity. The gradient flows through `P` alone.

    What other libraries compute comes from these arguments:

    - GShard, the Switch Transformer, V-MoE, Tutel: `assignments="first"`,
      the first two with their groups as `per`.
    - HF transformers, flaxformer: `normalize_by_top_k=False`, in HF with
      `assignments="logits"` and `scores="softmax"`. At balance this is
      `top_k`.
    - Megatron: `assignments="logits"`.
    - DeepSeek-V2 and V3, sequence-wise: `per="sequence"`.
    - Qwen, global-batch: `per="global"`.

    `"first"` and `"logits"` are for routers that put a token's best experts
    first. With `DenseRouter` and `ExpertChoiceRouter`, whose choices stand in
    the order of the experts, use `"all"`.

    Without a token the loss is 0.

    Args:
        weight: float. Factor of the loss. Defaults to `1e-2`.
        per: Groups of tokens that have a loss each: all tokens of the
            `"batch"`, those of each `"sequence"`, or of an int number of
            sequences. The loss is the mean over the groups that have a token.
            Where several devices train together, `"batch"` is the batch of all
            of them. `"global"` takes the assignments of all, and `P` from the
            tokens of each device; if these are equally many, the mean of the
            devices' losses, and its gradient, are those of `"batch"`. Defaults
            to `"batch"`.
        normalize_by_top_k: bool. If `False`, `f` is the number of assignments
            divided by the number of tokens. Defaults to `True`.
        assignments: `"all"` counts every choice of the router, `"first"` only
            the first of each token, `"logits"` the experts of the `K` largest
            logits, whatever the router chose. Defaults to `"all"`.
        scores: Where `P` comes from: `"router"` takes the probabilities of the
            router and divides them by their sum (for sigmoid scores it is not
            1), `"softmax"` the softmax of its logits, `"raw"` the probabilities
            as they are. Defaults to `"router"`.

    Call arguments:
        routing: A `keras_moe.routers.Routing`.
        mask: Boolean tensor of shape `(T,)`, or `None`. `False` tokens do not
            count.
        num_sequences: int. Number of sequences of equal length that the tokens
            are. Defaults to `1`.

    Raises:
        ValueError: If an argument is out of range, or the sequences do not
            make up whole groups.

    Example:

    >>> probs = keras.ops.eye(2)
    >>> routing = keras_moe.routers.Routing(
    ...     logits=probs,
    ...     probs=probs,
    ...     expert_indices=keras.ops.array([[0], [1]], "int32"),
    ...     expert_weights=keras.ops.ones((2, 1)),
    ... )
    >>> float(keras_moe.losses.LoadBalancingLoss(weight=1.0)(routing))
    1.0
    >>> loss = keras_moe.losses.LoadBalancingLoss(weight=1.0, per="sequence")
    >>> float(loss(routing, num_sequences=2))  # each has one token
    2.0

    Reference:

    - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), equations 4 to 6
    - [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), equations 17 to 20
      (sequence-wise)
    - [Qiu et al., 2025](https://arxiv.org/abs/2501.11873), section 3
      (global-batch)
    """

    def __init__(
        self,
        weight=1e-2,
        per="batch",
        normalize_by_top_k=True,
        assignments="all",
        scores="router",
    ):
        super().__init__(weight, "batch" if per == "global" else per)
        check_bool("normalize_by_top_k", normalize_by_top_k)
        check_one_of("assignments", assignments, ASSIGNMENTS)
        check_one_of("scores", scores, SCORES)
        self.per = per
        self.normalize_by_top_k = normalize_by_top_k
        self.assignments = assignments
        self.scores = scores

    def num_groups(self, num_sequences):
        if self.per == "global":
            return 1
        return super().num_groups(num_sequences)

    def group_losses(self, routing, mask, groups):
        num_experts = routing.probs.shape[-1]
        experts = assigned_experts(routing, self.assignments)
        counts = counts_by_expert(experts, num_experts, mask, groups)  # (G, E)
        counts = self._shared(counts)
        if self.normalize_by_top_k:
            total = ops.sum(counts, axis=-1, keepdims=True)
        else:
            total = self._token_counts(experts, mask, groups)
        share = ops.stop_gradient(counts / ops.maximum(total, 1.0))
        scores = expert_scores(routing, self.scores, mask)
        scores = self.means(scores, mask, groups)  # (G, E)
        return num_experts * ops.sum(share * scores, axis=-1)

    def _token_counts(self, experts, mask, groups):
        """`(G, 1)`."""
        if mask is None:
            mask = ops.ones_like(experts[:, 0], dtype="bool")
        tokens = self._shared(token_counts(mask, groups))
        return ops.expand_dims(tokens, -1)

    def _shared(self, sums):
        """The assignments are those of all devices with `"global"` too."""
        if self.per == "global":
            return backend.all_reduce_sum(sums)
        return self.over_devices(sums)

    def get_config(self):
        return {
            **super().get_config(),
            "normalize_by_top_k": self.normalize_by_top_k,
            "assignments": self.assignments,
            "scores": self.scores,
        }
