import keras
from keras import ops

from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.ops.capacity import expert_capacity
from keras_moe.ops.choices import existing_choices
from keras_moe.ops.groups import check_per
from keras_moe.ops.groups import group_size
from keras_moe.ops.groups import num_groups
from keras_moe.ops.groups import to_groups
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.noise import with_noise
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import SCORE_ACTIVATIONS
from keras_moe.ops.scores import score
from keras_moe.ops.selection import descending_ranks
from keras_moe.routers.linear_router import LinearRouter


@keras.saving.register_keras_serializable("keras_moe")
class ExpertChoiceRouter(LinearRouter):
    """Lets each expert choose its best tokens.

    ```
    logits = (tokens * jitter) @ kernel + bias      jitter only in training
    probs  = score_activation(logits + noise)       noise only in training
    C      = ceil(S * capacity_factor / num_experts)
    expert e takes the C tokens of the group, of S, with the largest
    probs[t, e], and weights them with it           ties to the earlier token
    ```

    All experts have the same load, so no balancing loss is needed: give `MoE`
    `losses=None`. A token gets between none and all of the experts,
    `capacity_factor` of them on average, and its weights are not normalized.

    What a token gets depends on later tokens: causal layers refuse it.

    Masked tokens are never chosen, but they count in `S`. If an expert has more
    places than there are tokens that are not masked, the others stay empty.

    Args:
        num_experts: int. Number of experts that choose.
        capacity_factor: float. Experts per token on average. A factor above
            `num_experts` is the same as `num_experts`. Defaults to `2.0`.
        capacity: int, or `None`. The number of tokens that an expert takes in
            each group, instead of `capacity_factor`. Defaults to `None`.
        capacity_multiple_of: int. Rounds the number of tokens from
            `capacity_factor` up to a multiple, before it is limited to `S`.
            Defaults to `1`.
        per: Which tokens an expert chooses from: `"batch"`, those of each
            `"sequence"`, or of an int number of sequences. Defaults to
            `"batch"`.
        score_activation: `"softmax"` over the experts of each token,
            `"sigmoid"` or `"sqrt_softplus"`. Defaults to `"softmax"`.
        noise_stddev: float. Standard deviation of the normal noise added to
            the logits in training. V-MoE has `1 / num_experts`. Defaults to
            `0.0`.
        **kwargs: Arguments of `keras_moe.routers.LinearRouter`: `jitter`,
            `temperature`, `use_bias`, initializers, regularizer, `seed`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`.
        training: bool. Whether to apply jitter and noise.
        num_sequences: int, or a scalar tensor. Number of sequences that the
            tokens are, if `per` is not `"batch"`. Defaults to `1`.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `K = num_experts`. Column `e` of
        `expert_indices` is `e` where expert `e` took the token, otherwise
        `num_experts`, with weight 0.

    Raises:
        ValueError: If an argument is out of range, `D` is not static, or the
            sequences do not make up whole groups.

    Example:

    >>> router = keras_moe.routers.ExpertChoiceRouter(
    ...     num_experts=2, capacity_factor=1.0, kernel_initializer="ones"
    ... )
    >>> routing = router(keras.ops.ones((4, 8)))
    >>> keras.ops.convert_to_numpy(routing.expert_indices).tolist()
    [[0, 1], [0, 1], [2, 2], [2, 2]]

    Reference:

    - [Zhou et al., 2022](https://arxiv.org/abs/2202.09368), section 3.2
    """

    looks_ahead = True
    distinct_choices = True
    routing_class = Routing
    why_no_eval_top_k = "the experts choose their tokens"

    def __init__(
        self,
        num_experts,
        capacity_factor=2.0,
        capacity=None,
        capacity_multiple_of=1,
        per="batch",
        score_activation="softmax",
        noise_stddev=0.0,
        **kwargs,
    ):
        super().__init__(num_experts, **kwargs)
        check_positive("capacity_factor", capacity_factor)
        if capacity is not None:
            check_int("capacity", capacity, 1)
        check_int("capacity_multiple_of", capacity_multiple_of, 1)
        check_per(per)
        check_one_of("score_activation", score_activation, SCORE_ACTIVATIONS)
        check_at_least("noise_stddev", noise_stddev, 0)
        self.capacity_factor = capacity_factor
        self.capacity = capacity
        self.capacity_multiple_of = capacity_multiple_of
        self.per = per
        self.score_activation = score_activation
        self.noise_stddev = noise_stddev
        if noise_stddev > 0:
            self.add_seed_generator()

    @property
    def choices_per_token(self):
        return self.num_experts

    def max_rows(self, num_tokens, num_sequences):
        """Number of places of all experts in all groups.

        Where the sizes are ints, at most `num_tokens * num_experts`. Where they
        are not known, `capacity` and `capacity_multiple_of` may ask for more
        places than there are tokens.
        """
        groups = num_groups(self.per, num_sequences)
        places = self._places(group_size(num_tokens, groups))
        return groups * self.num_experts * places

    def call(self, tokens, mask=None, training=None, num_sequences=1):
        if mask is not None:
            mask = ops.cast(mask, "bool")
        logits = self.logits(zero_masked(tokens, mask), training)  # (T, E)
        noisy = logits
        if training and self.noise_stddev > 0:
            noisy = with_noise(
                logits, self.noise_stddev, 0.0, self.seed_generator
            )
        probs = score(noisy, self.score_activation)
        chosen = self._chosen(probs, mask, num_sequences)
        experts = ops.arange(self.num_experts, dtype="int32")
        indices, weights = existing_choices(
            experts, probs, ops.logical_not(chosen), self.num_experts
        )
        return Routing(logits, probs, indices, weights)

    def _chosen(self, probs, mask, num_sequences):
        """Which experts take which tokens, `(T, E)` bool."""
        values = probs
        if mask is not None:
            mask = ops.expand_dims(mask, -1)  # (T, 1)
            values = ops.where(mask, probs, ops.full_like(probs, -1.0))
        groups = num_groups(self.per, num_sequences)
        values = to_groups(values, groups)  # (G, S, E)
        ranks = descending_ranks(ops.transpose(values, (0, 2, 1)))
        fits = ranks < self._places(ops.shape(values)[1])
        fits = ops.reshape(ops.transpose(fits, (0, 2, 1)), ops.shape(probs))
        return fits if mask is None else ops.logical_and(fits, mask)

    def _places(self, group_size):
        """`C`, limited to the size of the group if that is an int."""
        if self.capacity is not None:
            places = self.capacity
        else:
            factor = min(self.capacity_factor, self.num_experts)
            places = expert_capacity(group_size, self.num_experts, 1, factor)
            multiple = self.capacity_multiple_of
            places = -(-places // multiple) * multiple
        if isinstance(group_size, int):
            places = min(places, group_size)
        return places

    def get_config(self):
        return {
            **super().get_config(),
            "capacity_factor": self.capacity_factor,
            "capacity": self.capacity,
            "capacity_multiple_of": self.capacity_multiple_of,
            "per": self.per,
            "score_activation": self.score_activation,
            "noise_stddev": self.noise_stddev,
        }
