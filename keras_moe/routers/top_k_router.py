import keras

from keras_moe.checks import check_at_least
from keras_moe.checks import check_bool
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_rate
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import normalize_weights as normalized
from keras_moe.ops.scores import score
from keras_moe.ops.selection import limit_to_groups
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices
from keras_moe.routers.choice_arguments import as_normalize_weights
from keras_moe.routers.choice_arguments import check_choices
from keras_moe.routers.choice_arguments import check_quantiles
from keras_moe.routers.choice_arguments import check_weights
from keras_moe.routers.eval_top_k import EvalTopK
from keras_moe.routers.ranking_router import RankingRouter
from keras_moe.routers.token_choice import append_last_experts
from keras_moe.routers.token_choice import drop_experts
from keras_moe.routers.token_choice import scaled_by_expert

LEARNED_SCALES = (None, "expert", "global")


@keras.saving.register_keras_serializable("keras_moe")
class TopKRouter(EvalTopK, RankingRouter):
    """Sends each token to its `top_k` best experts.

    ```
    logits  = (tokens * jitter) @ kernel + bias     jitter only in training
    logits  = logits / temperature
    logits  = logit_softcap * tanh(logits / logit_softcap)
    noisy   = logits + noise                        noise only in training
    probs   = score_activation(noisy)               or of logits
    ranked  = probs + expert_bias                   in the best groups only
    indices = top_k(ranked)                         ties to the lower index
    weights = probs[indices]                        or, after the selection,
                                                    activation(noisy[indices])
    weights = weights / norm(weights)               if normalize_weights
    weights = weights * weight_scale
    ```

    Gradients reach the kernel through the weights; the choice itself has none.
    All of it is computed in float32.

    With `expert_bias` the load is balanced without a loss, as in DeepSeek-V3;
    `keras_moe.routers.RankingRouter` says how. In inference the number of
    experts may be another one, `eval_top_k`.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Experts per token. Defaults to `2`.
        score_activation: `"softmax"` over the experts, or `"sigmoid"` or
            `"sqrt_softplus"` of each. Defaults to `"softmax"`.
        score_after_selection: bool. Whether to choose among the logits and to
            score the chosen ones alone, so that softmax weights sum to one.
            Defaults to `False`.
        normalize_weights: bool. Whether to divide the weights of a token by
            their norm. Defaults to `True` for `top_k > 1`; refused for
            `top_k=1`, where the router would get no gradient.
        normalize_order: float, at least 1. Order of that norm; 1 is the sum.
            Defaults to `1`.
        normalize_epsilon: float. Added to that norm. Defaults to `1e-20`.
        weight_scale: float. Factor of the weights. Defaults to `1.0`.
        learned_scale: `"expert"` multiplies the weights by a learned number
            for each expert, `"global"` by one for all. Defaults to `None`.
        num_expert_groups: int. With several groups, of experts next to each
            other, a token chooses within its best groups. Defaults to `1`.
        top_k_groups: int. Groups a token chooses from. Defaults to `1`.
        group_score: int. How many of a group's best scores are summed to rank
            it: 1 in DeepSeek-V2, 2 in DeepSeek-V3. Defaults to `2`.
        num_always_on: int. That many experts, the last ones, are chosen by
            every token besides `top_k` of the others. Defaults to `0`.
        expert_dropout: float. Rate at which an expert is taken out of a token's
            candidates in training; where too few remain, it counts as the
            worst. Defaults to `0.0`.
        noisy_weights: bool. Whether the weights, too, come from the noisy
            logits. Defaults to `True`.
        eval_top_k: int, or `None` for `top_k`. Experts per token in inference;
            see `keras_moe.conversion.set_eval_top_k`. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.RankingRouter`:
            `noise_stddev`, `gumbel_noise`, `logit_softcap`, `expert_bias`,
            `bias_update` and what goes with it; of
            `keras_moe.routers.LinearRouter`: `jitter`, `temperature`,
            `use_bias`, `normalize_inputs`, initializers, `seed`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. Each token is routed on
            its own; masked ones do not count for the bias.
        training: bool. Whether to apply jitter, noise and expert dropout, and
            update the bias.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = top_k + num_always_on`, in
        inference `eval_top_k + num_always_on`. Its `probs` are the scores of
        all experts, with `score_after_selection` too.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=4, top_k=2)
    >>> routing = router(keras.ops.ones((3, 8)))
    >>> tuple(routing.expert_indices.shape), tuple(routing.probs.shape)
    ((3, 2), (3, 4))

    Reference:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 2.1
    - [Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2
    - [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2
      (groups, expert bias)
    - [Csordas et al., 2023](https://arxiv.org/abs/2310.10837), section 5
      (expert dropout)
    """

    distinct_choices = True
    routing_class = Routing

    def __init__(
        self,
        num_experts,
        top_k=2,
        score_activation="softmax",
        score_after_selection=False,
        normalize_weights=None,
        normalize_order=1,
        normalize_epsilon=1e-20,
        weight_scale=1.0,
        learned_scale=None,
        num_expert_groups=1,
        top_k_groups=1,
        group_score=2,
        num_always_on=0,
        expert_dropout=0.0,
        noisy_weights=True,
        eval_top_k=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        check_int("num_always_on", num_always_on, minimum=0)
        check_weights(score_activation, normalize_epsilon, weight_scale)
        check_bool("score_after_selection", score_after_selection)
        check_at_least("normalize_order", normalize_order, 1)
        check_one_of("learned_scale", learned_scale, LEARNED_SCALES)
        check_rate("expert_dropout", expert_dropout)
        check_bool("noisy_weights", noisy_weights)
        self.score_activation = score_activation
        self.score_after_selection = score_after_selection
        self.normalize_order = normalize_order
        self.normalize_epsilon = normalize_epsilon
        self.weight_scale = weight_scale
        self.learned_scale = learned_scale
        self.num_expert_groups = num_expert_groups
        self.top_k_groups = top_k_groups
        self.group_score = group_score
        self.num_always_on = num_always_on
        self.expert_dropout = expert_dropout
        self.noisy_weights = noisy_weights
        self.assign_top_k(top_k, eval_top_k)
        total = top_k + num_always_on
        self.normalize_weights = as_normalize_weights(normalize_weights, total)
        if score_after_selection and score_activation == "softmax":
            as_normalize_weights(True, total, name="score_after_selection")
        if self.bias_kind and self.bias_update == "quantile":
            check_quantiles(
                top_k, num_experts - num_always_on, num_expert_groups
            )
        if expert_dropout > 0:
            self.add_seed_generator()

    def max_choices(self, eval_top_k):
        return super().max_choices(eval_top_k) + self.num_always_on

    def check_top_k(self, name, number):
        check_choices(
            name,
            number,
            self.num_experts,
            self.num_always_on,
            self.num_expert_groups,
            self.top_k_groups,
            self.group_score,
        )

    def build(self, tokens_shape):
        super().build(tokens_shape)
        if self.learned_scale is not None:
            size = self.num_experts if self.learned_scale == "expert" else 1
            self.scale = self.add_weight(
                name="scale", shape=(size,), initializer="ones"
            )

    def call(self, tokens, mask=None, training=None):
        logits = self.logits(tokens, training)  # (T, E)
        noisy = self.noisy_logits(logits, training)
        return self.route(logits, noisy, mask, training)

    def route(self, logits, noisy, mask, training):
        """A `Routing` from logits without and with noise, `(T, E)`."""
        weighted = noisy if self.noisy_weights else logits
        probs = score(weighted, self.score_activation)
        ranked = self.ranked(noisy, probs if weighted is noisy else None)
        indices = self.select(ranked, training)  # (T, K)
        weights = self.weigh(weighted, probs, indices)
        routing = Routing(logits, probs, indices, weights)
        candidates = ranked[:, : self.num_experts - self.num_always_on]
        self.balance(candidates, routing, self.top_k, mask, training)
        return routing

    def ranked(self, noisy, probs=None):
        """What the bias is added to, `(T, E)`; `probs` may be known already."""
        by_score = self.bias_kind in (True, "scores") or (
            self.num_expert_groups > 1 and not self.bias_kind
        )
        if self.score_after_selection or not by_score:
            return noisy  # in the same order, with no two rounded to one
        return score(noisy, self.score_activation) if probs is None else probs

    def select(self, ranked, training):
        """The chosen experts, `(T, K)`, best first."""
        candidates = self.num_experts - self.num_always_on
        ranked = self.with_bias(ranked)[:, :candidates]
        if training and self.expert_dropout > 0:
            ranked = drop_experts(
                ranked, self.expert_dropout, self.seed_generator
            )
        if self.num_expert_groups > 1:
            ranked = limit_to_groups(
                ranked,
                self.num_expert_groups,
                self.top_k_groups,
                self.group_score,
            )
        chosen = top_k_indices(ranked, self.num_choices(training))
        return append_last_experts(chosen, self.num_always_on, self.num_experts)

    def weigh(self, logits, probs, indices):
        """The weights of the chosen experts, `(T, K)`."""
        weights = take_chosen(
            logits if self.score_after_selection else probs, indices
        )
        if self.score_after_selection:
            weights = score(weights, self.score_activation)
        if self.normalize_weights:
            weights = normalized(
                weights, self.normalize_epsilon, self.normalize_order
            )
        if self.weight_scale != 1:
            weights = weights * self.weight_scale
        if self.learned_scale is not None:
            weights = scaled_by_expert(
                weights, self.scale, indices, self.num_experts
            )
        return weights

    def get_config(self):
        return {
            **super().get_config(),
            "score_activation": self.score_activation,
            "score_after_selection": self.score_after_selection,
            "normalize_weights": self.normalize_weights,
            "normalize_order": self.normalize_order,
            "normalize_epsilon": self.normalize_epsilon,
            "weight_scale": self.weight_scale,
            "learned_scale": self.learned_scale,
            "num_expert_groups": self.num_expert_groups,
            "top_k_groups": self.top_k_groups,
            "group_score": self.group_score,
            "num_always_on": self.num_always_on,
            "expert_dropout": self.expert_dropout,
            "noisy_weights": self.noisy_weights,
        }
