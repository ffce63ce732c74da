import math

import keras

from keras_moe.checks import check_int
from keras_moe.checks import check_one_of
from keras_moe.checks import check_positive
from keras_moe.ops.capacity import CAPACITY_RULES
from keras_moe.ops.capacity import expert_capacity
from keras_moe.ops.dispatch_plan import DROP_POLICIES
from keras_moe.ops.groups import check_per
from keras_moe.ops.groups import group_size


@keras.saving.register_keras_serializable("keras_moe")
class Capacity:
    """How many rows each expert takes, and which further choices are dropped.

    A dropped choice gives zero; the residual connection around the layer
    carries the token. Dropping depends on the other tokens of the batch, or of
    the group set by `per`: with a capacity in inference, an example alone may
    give another output than in a batch.

    Args:
        capacity_factor: float, or `None` to drop nothing. The capacity as a
            multiple of the experts' fair share. Defaults to `None`.
        eval_capacity_factor: float, or `None`. The same in inference; infinity
            drops nothing, `None` keeps the limit of training. Defaults to
            `None`.
        rule: How the factor becomes a whole number of rows; the table is in
            `keras_moe.ops.expert_capacity`. Defaults to `"ceil"`.
        multiple_of: int. The capacity is rounded up to a multiple of it.
            Defaults to `1`.
        size: int, or `None`. The capacity itself, instead of
            `capacity_factor`. Defaults to `None`.
        drop_policy: Which choices are kept if an expert has too many.
            - `"position"`: first choices before second choices and so on, then
              earlier tokens first (GShard, Switch, V-MoE).
            - `"token"`: earlier tokens first, with all their choices
              (MegaBlocks, MaxText). With `top_k > 1`, only this policy keeps
              a causal model causal.
            - `"priority"`: like `"position"`, but tokens with the largest
              probability first (V-MoE's batch prioritized routing).
            - `"weight"`: the largest expert weights (Megatron's `probs`).
            - `"random"`: a random order in training, otherwise `"position"`
              (DeepSpeed's random token selection).
            Defaults to `"position"`.
        per: `"batch"` counts over all tokens of the batch, `"sequence"` within
            each sequence, an int within groups of that many sequences, of
            which the last may be smaller. Defaults to `"batch"`.
        normalize_kept_weights: bool. Whether the kept weights of a token are
            divided by their sum, so that the one kept choice of two gets weight
            1 (GShard's later implementations). Defaults to `False`.
        seed: int, or `None`. Seed of the policy `"random"`. Defaults to `None`.

    Raises:
        ValueError: If an argument is out of range, or `size` comes with
            `capacity_factor`.

    Example:

    >>> capacity = keras_moe.layers.Capacity(1.0, drop_policy="priority")
    >>> capacity.rows_per_expert(64, num_experts=8, top_k=2, training=True)
    16

    Reference:

    - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), algorithm 1
    - [Riquelme et al., 2021](https://arxiv.org/abs/2106.05974), section 4
    """

    def __init__(
        self,
        capacity_factor=None,
        eval_capacity_factor=None,
        rule="ceil",
        multiple_of=1,
        size=None,
        drop_policy="position",
        per="batch",
        normalize_kept_weights=False,
        seed=None,
    ):
        for name, factor in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
        ):
            # Infinity drops nothing.
            if factor not in (None, math.inf):
                check_positive(name, factor)
        check_int("multiple_of", multiple_of, minimum=1)
        if size is not None:
            check_int("size", size, minimum=1)
        if size is not None and capacity_factor is not None:
            raise ValueError(
                "`size` stands in the place of `capacity_factor`. "
                f"Received: size={size}, capacity_factor={capacity_factor}"
            )
        check_one_of("rule", rule, CAPACITY_RULES)
        check_one_of("drop_policy", drop_policy, DROP_POLICIES)
        check_per(per)
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.rule = rule
        self.multiple_of = multiple_of
        self.size = size
        self.drop_policy = drop_policy
        self.per = per
        self.normalize_kept_weights = normalize_kept_weights
        self.seed = seed

    @property
    def drops(self):
        """Whether a choice may be dropped, in training or in inference."""
        return self.limits(training=True) or self.limits(training=False)

    def limits(self, training):
        """Whether a choice may be dropped in training, or in inference."""
        size, factor = self._limit(training)
        return size is not None or factor not in (None, math.inf)

    def _limit(self, training):
        """`(size, factor)` in training or inference, at most one set."""
        if training or self.eval_capacity_factor is None:
            return self.size, self.capacity_factor
        return None, self.eval_capacity_factor

    def dropless_in_inference(self):
        """The same capacity, but without a limit in inference by default."""
        if self.eval_capacity_factor is not None or not self.drops:
            return self
        config = {**self.get_config(), "eval_capacity_factor": math.inf}
        return type(self).from_config(config)

    def rows_per_expert(self, num_tokens, num_experts, top_k, training):
        """The largest number of rows an expert takes from a group of tokens.

        Args:
            num_tokens: int or integer tensor. Tokens of the group.
            num_experts: int.
            top_k: int. Choices of a token.
            training: bool.

        Returns:
            int or int32 scalar, or `None` for no limit.
        """
        size, factor = self._limit(training)
        if size is not None:
            return size
        return expert_capacity(
            num_tokens, num_experts, top_k, factor, self.rule, self.multiple_of
        )

    def group_size(self, num_tokens, num_sequences):
        """Number of tokens that share one capacity."""
        if self.per == "batch":
            return num_tokens
        length = group_size(num_tokens, num_sequences)
        return length if self.per == "sequence" else self.per * length

    def get_config(self):
        return {
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "rule": self.rule,
            "multiple_of": self.multiple_of,
            "size": self.size,
            "drop_policy": self.drop_policy,
            "per": self.per,
            "normalize_kept_weights": self.normalize_kept_weights,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)
