import keras
from keras import ops

from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.checks import check_number
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.checks import check_rate
from keras_moe.checks import is_int
from keras_moe.ops.noise import gumbel
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import SCORE_ACTIVATIONS
from keras_moe.ops.scores import normalize_weights
from keras_moe.ops.scores import score
from keras_moe.ops.selection import limit_to_groups
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices
from keras_moe.routers.choice_arguments import check_groups
from keras_moe.routers.expert_bias import BIAS_KINDS
from keras_moe.routers.expert_bias import add_expert_bias
from keras_moe.routers.expert_bias import update_expert_bias
from keras_moe.routers.linear_router import LinearRouter

LEARNED_SCALES = (None, "expert", "global")


@keras.saving.register_keras_serializable("keras_moe")
class TopKRouter(LinearRouter):
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

    With `expert_bias` the load is balanced without a loss: in each training
    step the bias of experts with less than the mean load rises by
    `bias_update_rate`, that of experts with more falls. It takes part in the
    choice alone, never in the weights. Masked tokens do not count, inference
    and a router with `trainable=False` leave it as it is.

    Args:
        num_experts: int. Number of experts to choose from.
        top_k: int. Experts per token. Defaults to `2`.
        score_activation: `"softmax"` over the experts, or `"sigmoid"` or
            `"sqrt_softplus"` of each. Defaults to `"softmax"`.
        score_after_selection: bool. If `True`, the choice is made among the
            logits, and the weights are the score activation of the `top_k`
            chosen logits alone, so that softmax weights sum to one. Defaults
            to `False`.
        normalize_weights: bool. Whether to divide the weights of a token by
            their norm. Defaults to `True` for `top_k > 1`; refused for
            `top_k=1`, where the weight would always be one and the router
            would get no gradient.
        normalize_order: float, at least 1. Order of that norm; 1 is the sum.
            Defaults to `1`.
        normalize_epsilon: float. Added to that norm. Defaults to `1e-20`.
        weight_scale: float. Factor of the weights. Defaults to `1.0`.
        learned_scale: `"expert"` multiplies the weights by a learned number of
            the expert, `"global"` by one for all, `None` by none. Both start
            at 1. Defaults to `None`.
        num_expert_groups: int. With more than one, the experts are as many
            groups of equal size, next to each other, and each token chooses
            within its best groups only. Defaults to `1`.
        top_k_groups: int. Groups a token chooses from. Defaults to `1`.
        group_score: int. How many of a group's best scores are summed to rank
            it: 1 in DeepSeek-V2, 2 in DeepSeek-V3. Defaults to `2`.
        expert_bias: `True` or `"scores"` adds a bias to the scores that are
            ranked, `"logits"` ranks logits plus bias. Defaults to `False`.
        bias_update_rate: float. Step of the bias in training. 0 leaves it as
            it is. Defaults to `1e-3`.
        bias_update_centered: bool. Whether the mean of the steps is taken off
            them, so that the mean of the bias stays. Defaults to `False`.
        bias_update_steps: int. Calls whose loads are added up for one step of
            the bias: the `gradient_accumulation_steps` of the optimizer.
            Defaults to `1`.
        num_always_on: int. The last so many experts are chosen by every token,
            besides the `top_k` of the others, and share their normalization.
            Defaults to `0`.
        expert_dropout: float. Rate at which an expert is taken out of a token's
            candidates in training; where too few remain, it counts as the
            worst. Defaults to `0.0`.
        noise_stddev: float. Standard deviation of the normal noise added to
            the logits in training. Defaults to `0.0`.
        gumbel_noise: float. Factor of the Gumbel noise added to the logits in
            training. With 1 the experts are a sample, without replacement, from
            the softmax of `logits`, whose sharpness `temperature` sets.
            Defaults to `0.0`.
        noisy_weights: bool. Whether the weights, too, come from the noisy
            logits. Defaults to `True`.
        logit_softcap: float, or `None`. Bound of the logits, by a tanh.
            Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.LinearRouter`: `jitter`,
            `temperature`, `use_bias`, `normalize_inputs`, initializers, `seed`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. Each token is routed on
            its own; masked ones do not count for the bias.
        training: bool. Whether to apply jitter, noise and expert dropout, and
            update the bias.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = top_k + num_always_on`. Its
        `probs` are the scores of all experts, with `score_after_selection` too.

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
      (jitter, float32, initialization)
    - [DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2
      (groups, expert bias)
    - [Wang et al., 2024](https://arxiv.org/abs/2408.15664), algorithm 1
      (update of the bias)
    - [Csordas et al., 2023](https://arxiv.org/abs/2310.10837), section 5
      (expert dropout)
    """

    distinct_choices = True

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
        expert_bias=False,
        bias_update_rate=1e-3,
        bias_update_centered=False,
        bias_update_steps=1,
        num_always_on=0,
        expert_dropout=0.0,
        noise_stddev=0.0,
        gumbel_noise=0.0,
        noisy_weights=True,
        logit_softcap=None,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        check_int("num_always_on", num_always_on, minimum=0)
        num_candidates = num_experts - num_always_on
        if not is_int(top_k) or not 1 <= top_k <= num_candidates:
            always_on = f", num_always_on={num_always_on}" * (num_always_on > 0)
            raise ValueError(
                "`top_k` must be an int between 1 and `num_experts`. "
                f"Received: top_k={top_k!r}, num_experts={num_experts}"
                f"{always_on}"
            )
        check_one_of("score_activation", score_activation, SCORE_ACTIVATIONS)
        check_one_of("learned_scale", learned_scale, LEARNED_SCALES)
        check_one_of("expert_bias", expert_bias, BIAS_KINDS)
        several = top_k + num_always_on > 1
        if normalize_weights is None:
            normalize_weights = several
        constant = score_after_selection and score_activation == "softmax"
        if not several and (normalize_weights or constant):
            raise ValueError(
                "With `top_k=1`, weights normalized after the selection "
                "(`normalize_weights=True`, or `score_after_selection=True` "
                "with softmax) are always one, and the router would get no "
                f"gradient. Received: normalize_weights={normalize_weights}, "
                f"score_after_selection={score_after_selection}"
            )
        check_at_least("normalize_order", normalize_order, 1)
        check_at_least("normalize_epsilon", normalize_epsilon, 0)
        check_at_least("noise_stddev", noise_stddev, 0)
        check_at_least("gumbel_noise", gumbel_noise, 0)
        check_at_least("bias_update_rate", bias_update_rate, 0)
        check_rate("expert_dropout", expert_dropout)
        check_number("weight_scale", weight_scale)
        if logit_softcap is not None:
            check_positive("logit_softcap", logit_softcap)
        check_int("bias_update_steps", bias_update_steps, minimum=1)
        check_groups(
            num_candidates, top_k, num_expert_groups, top_k_groups, group_score
        )
        self.top_k = top_k
        self.score_activation = score_activation
        self.score_after_selection = score_after_selection
        self.normalize_weights = normalize_weights
        self.normalize_order = normalize_order
        self.normalize_epsilon = normalize_epsilon
        self.weight_scale = weight_scale
        self.learned_scale = learned_scale
        self.num_expert_groups = num_expert_groups
        self.top_k_groups = top_k_groups
        self.group_score = group_score
        self.bias_kind = expert_bias
        self.bias_update_rate = bias_update_rate
        self.bias_update_centered = bias_update_centered
        self.bias_update_steps = bias_update_steps
        self.num_always_on = num_always_on
        self.expert_dropout = expert_dropout
        self.noise_stddev = noise_stddev
        self.gumbel_noise = gumbel_noise
        self.noisy_weights = noisy_weights
        self.logit_softcap = logit_softcap
        if noise_stddev > 0 or gumbel_noise > 0 or expert_dropout > 0:
            self.add_seed_generator()

    @property
    def choices_per_token(self):
        return self.top_k + self.num_always_on

    def build(self, tokens_shape):
        super().build(tokens_shape)
        if self.learned_scale is not None:
            size = self.num_experts if self.learned_scale == "expert" else 1
            self.scale = self.add_weight(
                name="scale", shape=(size,), initializer="ones"
            )
        if self.bias_kind:
            add_expert_bias(self)

    def call(self, tokens, mask=None, training=None):
        logits = self.logits(tokens, training)  # (T, E)
        noisy = self.noisy_logits(tokens, logits, training)
        return self.route(logits, noisy, mask, training)

    def route(self, logits, noisy, mask, training):
        """A `Routing` from logits without and with noise, `(T, E)`."""
        weighted = noisy if self.noisy_weights else logits
        probs = score(weighted, self.score_activation)
        ranked = probs
        if weighted is not noisy:
            ranked = score(noisy, self.score_activation)
        indices = self.select(noisy, ranked, training)  # (T, K)
        weights = self.weigh(weighted, probs, indices)
        routing = Routing(logits, probs, indices, weights)
        self.balance(routing, mask, training)
        return routing

    def balance(self, routing, mask, training):
        """Takes a step of the expert bias, if it is time for one."""
        moves = self.bias_kind and self.bias_update_rate > 0
        if training and moves and self.trainable:
            update_expert_bias(self, routing, mask)

    def soften(self, logits):
        logits = super().soften(logits)
        if self.logit_softcap is not None:
            cap = self.logit_softcap
            logits = cap * ops.tanh(logits / cap)
        return logits

    def noisy_logits(self, tokens, logits, training):
        """The logits that the experts are chosen by, `(T, E)`."""
        if not training:
            return logits
        shape = ops.shape(logits)
        if self.noise_stddev > 0:
            logits = logits + keras.random.normal(
                shape,
                stddev=self.noise_stddev,
                dtype=self.compute_dtype,
                seed=self.seed_generator,
            )
        if self.gumbel_noise > 0:
            logits = logits + self.gumbel_noise * gumbel(
                shape, self.compute_dtype, self.seed_generator
            )
        return logits

    def select(self, logits, probs, training):
        """The chosen experts, `(T, K)`, best first."""
        ranked = probs
        if (
            self.score_after_selection
            or self.bias_kind == "logits"
            or not (self.bias_kind or self.num_expert_groups > 1)
        ):
            ranked = logits  # in the same order, with no two rounded to one
        if self.bias_kind:
            ranked = ranked + self.expert_bias
        ranked = ops.stop_gradient(ranked)
        candidates = self.num_experts - self.num_always_on
        if self.num_always_on:
            ranked = ranked[:, :candidates]
        if training and self.expert_dropout > 0:
            draws = keras.random.uniform(
                ops.shape(ranked), seed=self.seed_generator
            )
            # Before those that are out of the question, which are at -inf.
            worst = ops.minimum(ranked, -1e30)
            ranked = ops.where(draws < self.expert_dropout, worst, ranked)
        if self.num_expert_groups > 1:
            ranked = limit_to_groups(
                ranked,
                self.num_expert_groups,
                self.top_k_groups,
                self.group_score,
            )
        indices = top_k_indices(ranked, self.top_k)
        if self.num_always_on == 0:
            return indices
        always = ops.arange(candidates, self.num_experts, dtype="int32")
        always = ops.tile(
            ops.expand_dims(always, 0), (ops.shape(indices)[0], 1)
        )
        return ops.concatenate([indices, always], axis=-1)

    def weigh(self, logits, probs, indices):
        """The weights of the chosen experts, `(T, K)`."""
        if self.score_after_selection:
            chosen = take_chosen(logits, indices)
            weights = score(chosen, self.score_activation)
        else:
            weights = take_chosen(probs, indices)
        if self.normalize_weights:
            weights = normalize_weights(
                weights, self.normalize_epsilon, self.normalize_order
            )
        if self.weight_scale != 1:
            weights = weights * self.weight_scale
        if self.learned_scale == "global":
            weights = weights * self.scale
        if self.learned_scale == "expert":
            # A take from (E,) would have a gradient that adds up in any order.
            scale = ops.broadcast_to(
                ops.expand_dims(self.scale, 0), ops.shape(probs)
            )
            weights = weights * take_chosen(scale, indices)
        return weights

    def get_config(self):
        return {
            **super().get_config(),
            "top_k": self.top_k,
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
            "expert_bias": self.bias_kind,
            "bias_update_rate": self.bias_update_rate,
            "bias_update_centered": self.bias_update_centered,
            "bias_update_steps": self.bias_update_steps,
            "num_always_on": self.num_always_on,
            "expert_dropout": self.expert_dropout,
            "noise_stddev": self.noise_stddev,
            "gumbel_noise": self.gumbel_noise,
            "noisy_weights": self.noisy_weights,
            "logit_softcap": self.logit_softcap,
        }
