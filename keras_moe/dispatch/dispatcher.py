from typing import Any
from typing import NamedTuple

import keras
from keras import ops

from keras_moe.checks import check_one_of
from keras_moe.dispatch.capacity import Capacity
from keras_moe.ops.dispatch import combine
from keras_moe.ops.dispatch import to_rows
from keras_moe.ops.dispatch_plan import DispatchPlan
from keras_moe.ops.dispatch_plan import normalize_kept_weights
from keras_moe.ops.dispatch_plan import plan_dispatch
from keras_moe.ops.dispatch_plan import row_weights
from keras_moe.ops.dispatch_plan import with_positions
from keras_moe.ops.sizes import is_symbolic_size


class SendingPlan(NamedTuple):
    """Which row goes to which expert, and with which weight.

    Fields:
        weights: `(T, K)`. Weights of the experts' outputs or inputs.
        rows: A `keras_moe.ops.DispatchPlan`, without positions where every
            choice has a row.
        group_sizes: `(E,)` int32. Rows of each expert, without dropped ones.
        max_group_size: int or scalar tensor that no group exceeds.
        is_compact: bool. Whether there are fewer rows than choices.
    """

    weights: Any
    rows: DispatchPlan
    group_sizes: Any
    max_group_size: Any
    is_compact: bool


@keras.saving.register_keras_serializable("keras_moe")
class Dispatcher:
    """Sends tokens to their experts and sums the results of each token.

    ```
    y[t] = sum over k of expert_weights[t, k]
                         * experts[expert_indices[t, k]](tokens[t])
    ```

    over the kept choices. A call plans (which choices are kept, which row is
    for which choice), then computes in one of two ways with the same result:

    - Fused: `experts.mix` computes everything, and copies no rows.
    - Sent rows: each choice becomes a row, the rows are sorted by expert,
      `exchange` sends them to their experts and back, and the rows of each
      token are summed.

    A subclass that moves rows to the devices that own their experts overrides
    `exchange` and sets the class attribute `moves_rows = True`, so that rows
    are always sent.

    Args:
        capacity: A `keras_moe.layers.Capacity`, or `None` to drop nothing.
            Defaults to `None`.
        weights_on: `"output"` multiplies the experts' outputs by the weights,
            `"input"` their inputs (Llama 4). Defaults to `"output"`.

    Call arguments:
        tokens: `(T, ...)`, zero where masked.
        routing: A `keras_moe.routers.Routing` of these tokens.
        experts: A `keras_moe.experts.Experts`, which is built if it is not.
        mask: `(T,)` bool, or `None`. `False` tokens take no capacity and give
            zero. Defaults to `None`.
        training: bool. Selects the capacity, and whether experts apply dropout.
        router: The `keras_moe.routers.Router`, or `None`. Its declarations
            `distinct_choices` and `max_rows` save memory. Defaults to `None`.
        num_sequences: int or scalar tensor. Number of sequences of equal
            length, one after the other, that the tokens form. Defaults to `1`.

    Returns:
        `(outputs, group_sizes)`: `(T, ...)`, summed in float32 and in the dtype
        of the experts' rows, and `(E,)` int32, the rows of each expert.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> router = keras_moe.routers.TopKRouter(num_experts=4, top_k=2)
    >>> experts = keras_moe.experts.GLUExperts(4, intermediate_dim=8)
    >>> tokens = keras.ops.ones((6, 3))
    >>> dispatcher = keras_moe.dispatch.Dispatcher()
    >>> outputs, group_sizes = dispatcher(tokens, router(tokens), experts)
    >>> tuple(outputs.shape), int(keras.ops.sum(group_sizes))
    ((6, 3), 12)

    Reference:

    - [Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), equation 1
    - [Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), algorithm 1
    """

    moves_rows = False

    def __init__(self, capacity=None, weights_on="output"):
        capacity = Capacity() if capacity is None else capacity
        if isinstance(capacity, dict):
            capacity = keras.saving.deserialize_keras_object(capacity)
        if not isinstance(capacity, Capacity):
            raise ValueError(
                "`capacity` must be a keras_moe.layers.Capacity or None. "
                f"Received: capacity={capacity!r}"
            )
        check_one_of("weights_on", weights_on, ("output", "input"))
        self.capacity = capacity
        self.weights_on = weights_on
        # State that each call with random dropping changes. The layer that
        # uses this dispatcher tracks it.
        self.seed_generator = None
        if capacity.drop_policy == "random":
            self.seed_generator = keras.random.SeedGenerator(capacity.seed)

    def __call__(
        self,
        tokens,
        routing,
        experts,
        mask=None,
        training=None,
        router=None,
        num_sequences=1,
    ):
        plan = self.plan(
            routing, experts.num_experts, mask, training, router, num_sequences
        )
        if not experts.built:
            experts.build((None, *tokens.shape[1:]))
        outputs = None
        dtype = keras.backend.standardize_dtype(tokens.dtype)
        if not (
            self.moves_rows
            or plan.is_compact
            or self.weights_on == "input"
            or dtype != experts.compute_dtype
        ):
            outputs = experts.mix(
                tokens,
                row_weights(plan.rows, plan.weights),
                plan.rows.choices,
                plan.group_sizes,
                training=training,
            )
        if outputs is None:
            outputs = self._send(tokens, routing, experts, plan, training)
        return outputs, plan.group_sizes

    def plan(
        self,
        routing,
        num_experts,
        mask=None,
        training=None,
        router=None,
        num_sequences=1,
    ):
        """Decides which choices are kept, and which row is for which choice.

        Args:
            routing, mask, training, router, num_sequences: As for a call.
            num_experts: int.

        Returns:
            A `SendingPlan`. No token is moved.
        """
        capacity = self.capacity
        num_tokens, top_k = ops.shape(routing.expert_indices)
        group_size = capacity.group_size(num_tokens, num_sequences)
        limit = capacity.rows_per_expert(
            group_size, num_experts, top_k, training
        )
        max_rows = None
        # With a symbolic size, it is unknown whether `max_rows` exceeds it.
        if router is not None and not is_symbolic_size(num_tokens):
            max_rows = router.max_rows(num_tokens, num_sequences)
        group_sizes, rows = plan_dispatch(
            routing,
            num_experts,
            mask,
            limit,
            capacity.drop_policy,
            None if capacity.per == "batch" else group_size,
            max_rows,
            seed=self.seed_generator if training else None,
        )
        weights = routing.expert_weights
        if capacity.normalize_kept_weights:
            weights = normalize_kept_weights(rows, weights)
        distinct = router is not None and router.distinct_choices
        max_group_size = num_tokens if distinct else num_tokens * top_k
        if isinstance(limit, int) and isinstance(max_group_size, int):
            num_groups = -(-num_tokens // group_size) if group_size else 0
            max_group_size = min(limit * num_groups, max_group_size)
        return SendingPlan(
            weights, rows, group_sizes, max_group_size, max_rows is not None
        )

    def exchange(
        self, rows, group_sizes, experts, training=None, max_group_size=None
    ):
        """Sends rows to their experts and returns the results.

        Here one device owns all experts. A subclass overrides this to send rows
        to other devices and back.

        Args:
            rows: `(N, ...)`, the rows of expert 0 first.
            group_sizes: `(E,)` int32. Rows of each expert.
            experts: A `keras_moe.experts.Experts`.
            training: bool.
            max_group_size: int or scalar tensor that no group exceeds, or
                `None`.

        Returns:
            `(N, ...)`, the result of each row, in the same order.
        """
        kwargs = {}
        if experts.uses_max_group_size:
            kwargs["max_group_size"] = max_group_size
        return experts(rows, group_sizes, training=training, **kwargs)

    def _send(self, tokens, routing, experts, plan, training):
        """Computes with sent rows, `(T, ...)`."""
        weights, rows_plan = plan.weights, plan.rows
        if not plan.is_compact:
            rows_plan = with_positions(rows_plan, routing)
        rows = to_rows(tokens, rows_plan)  # (N, ...)
        if self.weights_on == "input":
            factors = row_weights(rows_plan, weights)
            missing = (1,) * (len(rows.shape) - 1)
            factors = ops.reshape(factors, (-1, *missing))
            rows = rows * ops.cast(factors, rows.dtype)
            exists = routing.expert_indices < experts.num_experts
            weights = ops.cast(exists, weights.dtype)
        rows = self.exchange(
            rows,
            plan.group_sizes,
            experts,
            training=training,
            max_group_size=plan.max_group_size,
        )
        return combine(rows, rows_plan, weights)

    def get_config(self):
        return {
            "capacity": keras.saving.serialize_keras_object(self.capacity),
            "weights_on": self.weights_on,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)
