import keras
import numpy as np
from keras import ops

from keras_moe.checks import check_bool
from keras_moe.checks import check_one_of
from keras_moe.checks import is_number
from keras_moe.ops.noise import gumbel
from keras_moe.ops.scores import rankable
from keras_moe.ops.selection import top_k_indices
from keras_moe.routers.top_k_router import TopKRouter

POLICIES = ("random", "sampling", "all")


@keras.saving.register_keras_serializable("keras_moe")
class GShardRouter(TopKRouter):
    """Sends each token to its best expert, and to others at random.

    As `TopKRouter`, but in training the choices after the first depend on
    `policy`:

    - `"random"` keeps choice `j` with the probability
      `min(1, weights[j] / threshold)`. GShard has a threshold of 0.5, ST-MoE
      one of 0.2.
    - `"sampling"` draws them from the other experts, without replacement, with
      their probabilities.
    - `"all"` keeps the best: then this is `TopKRouter`.

    A choice that is not kept does not exist: it takes no capacity, and the
    weights of the others stay what they are.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int, at least 2. Experts per token, at most. Defaults to `2`.
        policy: `"random"`, `"sampling"` or `"all"`. Defaults to `"random"`.
        threshold: float, or a sequence of one for each choice after the first.
            A choice of this weight or more is always kept. Defaults to `0.5`.
        random_in_inference: bool. Whether to draw in inference, too. Defaults
            to `False`.
        **kwargs: Arguments of `keras_moe.routers.TopKRouter`. With
            `normalize_weights=False` the weights that are compared with the
            threshold are probabilities;
            `keras_moe.layers.Capacity(normalize_kept_weights=True)` then
            normalizes the weights of what is left after dropping.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`; as in `TopKRouter`.
        training: bool. Whether to draw.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = top_k`. Choices that are not
        kept have the index `num_experts` and the weight 0.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.GShardRouter(num_experts=4)
    >>> routing = router(keras.ops.ones((3, 8)))
    >>> tuple(routing.expert_indices.shape)
    (3, 2)

    Reference:

    - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), section 2.2
      and algorithm 1
    - [Zoph et al., 2022](https://arxiv.org/abs/2202.08906), appendix C
    """

    def __init__(
        self,
        num_experts,
        top_k=2,
        policy="random",
        threshold=0.5,
        random_in_inference=False,
        **kwargs,
    ):
        super().__init__(num_experts, top_k, **kwargs)
        check_one_of("policy", policy, POLICIES)
        check_bool("random_in_inference", random_in_inference)
        if top_k < 2 or self.num_always_on:
            raise ValueError(
                "`top_k` must be at least 2 and `num_always_on` 0. Received: "
                f"top_k={top_k}, num_always_on={self.num_always_on}"
            )
        limits = self.bias_kind or self.expert_dropout
        if policy == "sampling" and (limits or self.num_expert_groups > 1):
            raise ValueError(
                "The policy 'sampling' draws from all other experts, without "
                "groups, bias or dropout. Received: policy='sampling', "
                f"num_expert_groups={self.num_expert_groups}, "
                f"expert_bias={self.bias_kind}, "
                f"expert_dropout={self.expert_dropout}"
            )
        one = np.ndim(threshold) == 0
        thresholds = [threshold] * (top_k - 1) if one else list(threshold)
        if len(thresholds) != top_k - 1 or not all(
            is_number(t) and t > 0 for t in thresholds
        ):
            raise ValueError(
                "`threshold` must be a positive number, or a sequence of them "
                f"for the choices after the first, {top_k - 1}. "
                f"Received: threshold={threshold!r}"
            )
        self.policy = policy
        thresholds = [float(t) for t in thresholds]
        self.threshold = thresholds[0] if one else thresholds
        self.random_in_inference = random_in_inference
        if policy != "all":
            self.add_seed_generator()

    def call(self, tokens, mask=None, training=None):
        routing = super().call(tokens, mask=mask, training=training)
        if self.policy != "random" or not self._draws(training):
            return routing
        others = routing.expert_weights[:, 1:]  # (T, K - 1)
        if others.shape[1] == 0:
            return routing
        draws = keras.random.uniform(
            ops.shape(others),
            dtype=self.compute_dtype,
            seed=self.seed_generator,
        )
        thresholds = ops.convert_to_tensor(
            [self._thresholds(others.shape[1])], dtype=self.compute_dtype
        )
        kept = draws < ops.stop_gradient(others) / thresholds
        kept = ops.concatenate([ops.ones_like(kept[:, :1]), kept], axis=-1)
        indices, weights = routing.expert_indices, routing.expert_weights
        return routing._replace(
            expert_indices=ops.where(kept, indices, self.num_experts),
            expert_weights=ops.where(kept, weights, ops.zeros_like(weights)),
        )

    def _thresholds(self, number):
        """One for each choice after the first; `eval_top_k` may add some."""
        if isinstance(self.threshold, float):
            return [self.threshold] * number
        last = self.threshold[-1:] * number
        return [*self.threshold, *last][:number]

    def select(self, ranked, training):
        indices = super().select(ranked, training)
        if self.policy != "sampling" or not self._draws(training):
            return indices
        first = indices[:, :1]
        # Without bias and groups the experts are ranked by their logits.
        draws = gumbel(
            ops.shape(ranked), self.compute_dtype, self.seed_generator
        )
        experts = ops.arange(self.num_experts, dtype="int32")
        is_first = ops.equal(ops.expand_dims(experts, 0), first)
        drawn = ops.where(is_first, float("-inf"), rankable(ranked + draws))
        others = top_k_indices(drawn, indices.shape[1] - 1)
        return ops.concatenate([first, others], axis=-1)

    def _draws(self, training):
        return training or self.random_in_inference

    def get_config(self):
        return {
            **super().get_config(),
            "policy": self.policy,
            "threshold": self.threshold,
            "random_in_inference": self.random_in_inference,
        }
