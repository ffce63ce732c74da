import keras
from keras import ops

from keras_moe.checks import check_at_least
from keras_moe.checks import check_int
from keras_moe.checks import check_int_up_to
from keras_moe.ops.masking import zero_masked
from keras_moe.ops.noise import with_noise
from keras_moe.ops.routing import Routing
from keras_moe.ops.scores import normalize_weights as normalized
from keras_moe.ops.scores import softmax
from keras_moe.ops.selection import take_chosen
from keras_moe.ops.selection import top_k_indices
from keras_moe.routers.choice_arguments import as_normalize_weights
from keras_moe.routers.eval_top_k import EvalTopK
from keras_moe.routers.linear_router import LinearRouter
from keras_moe.stacked.draws import own_draws


@keras.saving.register_keras_serializable("keras_moe")
class HierarchicalRouter(EvalTopK, LinearRouter):
    """Chooses groups of experts, then experts within each of them.

    ```
    group_probs = softmax(tokens @ group_kernel)              (T, A)
    inner_probs = softmax(tokens @ inner_kernel, axis=-1)     (T, A, B)
    groups      = top_k_groups(group_probs)
    experts     = top_k(inner_probs[groups])                  in each of them
    weights     = group_probs[groups] * inner_probs[groups, experts]
    ```

    On each level the probabilities of the chosen are divided by their sum,
    which is the softmax over their logits. Expert `j` of group `i` is expert
    `i * experts_per_group + j` of the bank. Groups have their own logits here,
    while `keras_moe.routers.TopKRouter` ranks groups by their experts.

    Args:
        num_groups: int. `A`, the number of groups.
        experts_per_group: int. `B`; there are `A * B` experts.
        top_k_groups: int. Groups per token. Defaults to `2`.
        top_k: int. Experts per token in each of its groups. Defaults to `2`.
        normalize_group_weights: bool. Whether the weights of the chosen groups
            are divided by their sum. Defaults to `True` for `top_k_groups > 1`;
            refused for `top_k_groups=1`, where the weight would always be one
            and the group kernel would get no gradient.
        normalize_weights: bool. The same for the experts of each group.
            Defaults to `True` for `top_k > 1`.
        noise_stddev: float. Standard deviation of the normal noise added to
            the logits of both levels in training. Defaults to `0.0`.
        eval_top_k: int, or `None` for `top_k`. Experts per group in inference;
            see `keras_moe.conversion.set_eval_top_k`. Defaults to `None`.
        **kwargs: Arguments of `keras_moe.routers.LinearRouter` except
            `use_bias`: `jitter`, `temperature` (of both levels),
            `normalize_inputs`, `kernel_initializer`, `seed`.

    Call arguments:
        tokens: Tensor of shape `(T, D)`.
        mask: Boolean tensor of shape `(T,)`, or `None`. Each token is routed on
            its own, and what masked ones hold reaches nothing.
        training: bool. Whether to apply jitter and noise.

    Input shape:
        `(T, D)`

    Output:
        A `keras_moe.routers.Routing` with `E = A * B` and
        `K = top_k_groups * top_k`, in inference `top_k_groups * eval_top_k`,
        the largest weight first. Its `probs` are `group_probs * inner_probs`,
        its `logits` the logit of the group plus the logarithm of `inner_probs`.
        Without noise the softmax of these is `probs`. Their `logsumexp`, which
        `RouterZLoss` keeps small, is the one of the groups.

    Raises:
        ValueError: If an argument is out of range, or `D` is not static.

    Example:

    >>> router = keras_moe.routers.HierarchicalRouter(
    ...     num_groups=3, experts_per_group=4
    ... )
    >>> routing = router(keras.ops.ones((5, 8)))
    >>> tuple(routing.probs.shape), tuple(routing.expert_indices.shape)
    ((5, 12), (5, 4))

    Reference:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), appendix B,
      equation 12
    """

    distinct_choices = True
    routing_class = Routing

    def __init__(
        self,
        num_groups,
        experts_per_group,
        top_k_groups=2,
        top_k=2,
        normalize_group_weights=None,
        normalize_weights=None,
        noise_stddev=0.0,
        eval_top_k=None,
        **kwargs,
    ):
        check_int("num_groups", num_groups, minimum=1)
        check_int("experts_per_group", experts_per_group, minimum=1)
        super().__init__(num_groups * experts_per_group, **kwargs)
        if self.use_bias:
            raise ValueError(
                "`use_bias` must be False: HierarchicalRouter has no bias. "
                "Received: use_bias=True"
            )
        self.num_groups = num_groups
        self.experts_per_group = experts_per_group
        self.top_k_groups = top_k_groups
        check_int_up_to("top_k_groups", top_k_groups, "num_groups", num_groups)
        self.normalize_group_weights = as_normalize_weights(
            normalize_group_weights,
            top_k_groups,
            name="normalize_group_weights",
            limit_name="top_k_groups",
        )
        self.assign_top_k(top_k, eval_top_k)
        self.normalize_weights = as_normalize_weights(normalize_weights, top_k)
        check_at_least("noise_stddev", noise_stddev, 0)
        self.noise_stddev = noise_stddev
        if noise_stddev > 0:
            self.add_seed_generator()

    def check_top_k(self, name, number):
        check_int_up_to(
            name, number, "experts_per_group", self.experts_per_group
        )

    def max_choices(self, eval_top_k):
        return self.top_k_groups * super().max_choices(eval_top_k)

    def build_logits(self, dim):
        first = self.kernel_initializer
        for name, width, initializer in (
            ("group_kernel", self.num_groups, first),
            ("inner_kernel", self.num_experts, own_draws(first, 1)),
        ):
            # As a matrix, whose fans Keras computes right.
            kernel = self.add_weight(
                name=name,
                shape=(dim, width),
                initializer=initializer,
                regularizer=self.kernel_regularizer,
            )
            setattr(self, name, kernel)

    def raw_logits(self, tokens):
        """Logits of the groups, then of the experts in them, `(T, A + A B)`."""
        kernels = [self.group_kernel, self.inner_kernel]
        return ops.concatenate(
            [ops.einsum("td,de->te", tokens, k) for k in kernels], axis=-1
        )

    def call(self, tokens, mask=None, training=None):
        both = self.logits(zero_masked(tokens, mask), training)
        group_logits, inner_logits = self._levels(both)
        logits = ops.expand_dims(group_logits, -1) + ops.log_softmax(
            inner_logits, axis=-1
        )
        if training and self.noise_stddev > 0:
            both = with_noise(both, self.noise_stddev, 0.0, self.seed_generator)
            group_logits, inner_logits = self._levels(both)
        group_probs = softmax(group_logits)  # (T, A)
        inner_probs = softmax(inner_logits)  # (T, A, B)
        groups = top_k_indices(group_logits, self.top_k_groups)  # (T, K1)
        group_weights = take_chosen(group_probs, groups)
        if self.normalize_group_weights:
            group_weights = normalized(group_weights)
        top_k = self.num_choices(training)
        experts = top_k_indices(
            self._of_groups(inner_logits, groups), top_k
        )  # (T, K1, K2)
        weights = ops.take_along_axis(
            self._of_groups(inner_probs, groups), experts, axis=-1
        )
        if self.normalize_weights:
            weights = normalized(weights)
        weights = ops.expand_dims(group_weights, -1) * weights
        experts = experts + ops.expand_dims(groups, -1) * self.experts_per_group
        top_k = self.top_k_groups * top_k
        weights = ops.reshape(weights, (-1, top_k))
        experts = ops.reshape(experts, (-1, top_k))
        order = top_k_indices(weights, top_k)
        return Routing(
            ops.reshape(logits, (-1, self.num_experts)),
            ops.reshape(
                ops.expand_dims(group_probs, -1) * inner_probs,
                (-1, self.num_experts),
            ),
            take_chosen(experts, order),
            take_chosen(weights, order),
        )

    def _levels(self, both):
        groups, inner = both[:, : self.num_groups], both[:, self.num_groups :]
        shape = (-1, self.num_groups, self.experts_per_group)
        return groups, ops.reshape(inner, shape)

    def _of_groups(self, values, groups):
        """`(T, A, B)` -> `(T, K1, B)`, of the chosen groups."""
        shape = (ops.shape(groups)[0], self.top_k_groups, values.shape[-1])
        groups = ops.broadcast_to(ops.expand_dims(groups, -1), shape)
        return ops.take_along_axis(values, groups, axis=1)

    def get_config(self):
        config = super().get_config()
        for name in ("num_experts", "use_bias"):
            config.pop(name)
        return {
            **config,
            "num_groups": self.num_groups,
            "experts_per_group": self.experts_per_group,
            "top_k_groups": self.top_k_groups,
            "normalize_group_weights": self.normalize_group_weights,
            "normalize_weights": self.normalize_weights,
            "noise_stddev": self.noise_stddev,
        }
